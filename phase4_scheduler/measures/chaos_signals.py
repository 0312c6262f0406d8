"""Signals at any moment of a server's life: it ends, says nothing ugly, and leaves nothing behind."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from phase4_scheduler.measures.chaos_server import PATIENCE, Victim, is_gone, wait

ENDED = {signal.SIGTERM: (0, -signal.SIGTERM), signal.SIGINT: (0, -signal.SIGINT, 130)}


def start_time(model: str, settings: dict[str, Any]) -> float:
    """Seconds from the start until it is ready, now on this machine."""
    began = time.monotonic()
    with Victim(model, settings) as victim:
        victim.wait_ready()
        return time.monotonic() - began


def while_starting(
    model: str, settings: dict[str, Any], seconds: float, signals: Sequence[signal.Signals] = (signal.SIGTERM,)
) -> list[str]:
    """Start a server, send it signals in a row after so many seconds; returns what was wrong with its end."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        directory = Path(name)
        with Victim(model, settings, directory=directory) as victim:
            time.sleep(seconds)
            for number in signals:
                victim.process.send_signal(number)
            status = victim.process.wait(PATIENCE)
            return [f"{seconds:.3f} s, {signals}: {fault}" for fault in left_behind(victim, directory, status, signals)]


def left_behind(victim: Victim, directory: Path, status: int, signals: Sequence[signal.Signals]) -> list[str]:
    """What is wrong with a server that has ended: status, words, processes, files."""
    faults = []
    if status not in {one for number in signals for one in ENDED[number]}:
        faults.append(f"exit status {status}")
    if "Traceback" in victim.log or "Error" in victim.log:
        faults.append(f"it wrote {victim.log}")
    left = born_in(directory)
    wait(lambda: all(map(is_gone, left)), f"processes {left} are left")
    wait(lambda: not list(directory.iterdir()), f"{list(directory.iterdir())} is left")
    return faults


def born_in(directory: Path) -> list[psutil.Process]:
    """Processes whose temporary files belong there: those of one server, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(directory):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
