"""Small clients of the server, to be read and run: curl.sh, client.py. See README.md."""
