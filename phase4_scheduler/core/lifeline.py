"""A process that does not outlive its parent, however that one ends: `kill -9`, a crash, an exit that forgot it.

Two ropes, for each has a way to fail:

* a pipe whose other end the parent holds. When the parent is gone, whatever the reason, the kernel closes it, and a
  thread that waits for that kills the process. Portable; but the thread needs Python's lock to wake up, which a native
  function that hangs may never give back.
* `prctl(PR_SET_PDEATHSIG)`: Linux itself sends SIGKILL. No lock is needed; but it is sent when the *thread* that forked
  ends, so the parent must not fork in a thread of a pool, and it is not sent for a parent that was gone before.

Closing the pipe is also how the parent ends a process that does not listen, as while it reads weights.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def hold(pipe: int, parent: int) -> None:
    """Tie this process to its parent from now on.

    Args:
        pipe: descriptor to read from; the parent holds the other end and writes no more.
        parent: process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        _end()
    threading.Thread(target=_watch, args=(pipe,), name="lifeline", daemon=True).start()


def _watch(pipe: int) -> None:
    while os.read(pipe, 4096):
        pass
    _end()


def _end() -> None:
    """Kill this process, and its children where it has a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
