"""The engine in a process of its own: messages, channels, the process, who watches it, and its client."""
