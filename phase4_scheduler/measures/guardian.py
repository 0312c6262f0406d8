"""Ends a server whose measurement was killed: `python guardian.py PID`, with a pipe from the measurement as its input.

A measurement that runs out of time is ended with SIGKILL and can't clean up. Its servers have sessions of their own
and may be halted: without this, they would hold their memory for ever. The pipe closes with the process that holds it.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import psutil


def guard(pid: int) -> None:
    """Wait for the end of the input, then kill the process and all that came of it."""
    sys.stdin.buffer.read()
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    guard(int(sys.argv[1]))
