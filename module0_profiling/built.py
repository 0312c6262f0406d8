"""Libraries that are built on the machine that runs them: once, by its compiler, into a file that all may want."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

PATIENCE = 300.0  # seconds


class BuildError(Exception):
    """A compiler that failed: one line."""


def build(file: Path, make: Callable[[Path], Path]) -> None:
    """Make a file in a folder of its own and move it to its place: others may do the same at the same time.

    Args:
        file: that is wanted; its folder is made if need be.
        make: is given an empty folder and returns the file that it made there; may raise `BuildError`.

    Raises:
        OSError: the folder can't be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="making-") as name:
        os.replace(make(Path(name)), file)


def run(commands: Sequence[Sequence[str]], folder: Path, what: str) -> None:
    """Run compilers side by side in a folder.

    Args:
        what: they build, for the message.

    Raises:
        BuildError: with the first error that one of them names.
    """
    running = [
        subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    name = Path(commands[0][0]).name
    try:
        said = [process.communicate(timeout=PATIENCE)[1] for process in running]
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} did not build {what} within {PATIENCE:.0f} s") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
    for process, text in zip(running, said, strict=True):
        if process.returncode:
            lines = text.strip().splitlines() or [f"exit status {process.returncode}"]
            first = next((line for line in lines if line.startswith("error") or "error:" in line), lines[0])
            raise BuildError(f"{name} cannot build {what}: {first}")
