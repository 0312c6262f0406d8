"""The rooms of the course, in the order in which they are read: module0, then phase 0 to 7.

A room is a directory beside this package named `module0_…` or `phaseN_…` that holds Python. It is found by looking, so
adding a phase is adding its directory. Functions take the repository's root, so that a course can be built anywhere.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOM = re.compile(r"(?P<phase>(?P<kind>module|phase)(?P<number>\d+))_[a-z0-9_]+")


class UnknownPhaseError(ValueError):
    """A phase that does not exist; the message lists those that do."""

    is_user_error = True  # the command line prints it as one line


def discover(root: Path | None = None) -> tuple[str, ...]:
    """Names of the room packages under root, modules first, then phases by number."""
    found = [folder.name for folder in (root or ROOT).iterdir() if ROOM.fullmatch(folder.name) and _has_python(folder)]
    return tuple(sorted(found, key=_order))


def phase(room: str) -> str:
    """The short name of a room: `phase0_prototype` -> `phase0`."""
    match = ROOM.fullmatch(room)
    if not match:
        raise UnknownPhaseError(f"{room!r} is not a room: rooms are named like phase0_prototype")
    return match["phase"]


def room(name: str, root: Path | None = None) -> str:
    """The package of a phase: `phase0`, `0` or `phase0_prototype` -> `phase0_prototype`.

    Raises:
        UnknownPhaseError: one line that lists the phases that exist.
    """
    rooms = discover(root)
    wanted = f"phase{name}" if name.isdigit() else name
    for candidate in rooms:
        if wanted in (candidate, phase(candidate)):
            return candidate
    known = ", ".join(phase(candidate) for candidate in rooms) or "none yet"
    raise UnknownPhaseError(f"there is no phase {name!r}: the phases are {known}")


def _has_python(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.py"))


def _order(name: str) -> tuple[str, int]:
    match = ROOM.fullmatch(name)
    assert match is not None
    return match["kind"], int(match["number"])


ROOMS = discover()
