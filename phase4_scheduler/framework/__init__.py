"""Where phase 4 starts: right answers in static batches, a device that waits for Python, a server with one customer."""
