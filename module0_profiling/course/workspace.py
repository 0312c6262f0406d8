"""The learner's folder: copy the framework in, see what was changed, take it back.

`workspace/.origin.json` remembers the digest of each file as it was copied. So three things can be told apart: a file
that the learner changed (kept), one that only the framework changed since (refreshed by `start`), and one that is as
it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from module0_profiling import rooms
from module0_profiling.course.errors import CourseError
from module0_profiling.course.loader import WORKSPACE
from module0_profiling.course.parts import framework_of, workspace_of
from module0_profiling.results import write_atomically

State = Literal["unchanged", "changed", "outdated", "missing", "added"]


@dataclass(frozen=True)
class Started:
    """What `start` did, as paths relative to the room.

    Attributes:
        copied: files that were written.
        kept: files that the learner had changed and that were left alone.
        backup: where overwritten files went, when there were any.
    """

    folder: Path
    copied: tuple[str, ...]
    kept: tuple[str, ...]
    backup: Path | None = None


@dataclass(frozen=True)
class Restored:
    """What `reset` did: the files written, and where the learner's versions of them are kept."""

    files: tuple[str, ...]
    backup: Path | None


def start(phase: str, *, force: bool = False, root: Path | None = None) -> Started:
    """Copy the framework of a phase into the workspace.

    Args:
        phase: as accepted by rooms.room.
        force: overwrite files that the learner changed; a backup is kept.

    Raises:
        CourseError: the phase has no framework.
    """
    room, base = _room(phase, root)
    states = status(phase, root)
    changed = tuple(name for name, state in states.items() if state == "changed")
    wanted = [name for name, state in states.items() if state in ("missing", "outdated") or (force and name in changed)]
    backup = _back_up(room, [name for name in wanted if name in changed], base)
    _copy(room, wanted, base)
    return Started(workspace_of(room, base), tuple(wanted), () if force else changed, backup)


def reset(phase: str, part: str | None = None, *, root: Path | None = None) -> Restored:
    """Restore the framework's version of one part, or of all; what the learner had is kept under workspace/.backup.

    Args:
        part: module name (`kv_cache`) or file name (`kv_cache.py`); None means every file.

    Raises:
        CourseError: no framework, or no such part.
    """
    room, base = _room(phase, root)
    states = status(phase, root)
    names = [name for name, state in states.items() if state != "added"]
    if part is not None:
        names = [name for name in names if part in (name, str(Path(name).with_suffix("")), _dotted(name))]
        if not names:
            known = ", ".join(sorted({_dotted(name) for name, state in states.items() if state != "added"}))
            raise CourseError(f"{phase} has no part {part!r}: its parts are {known}")
    wanted = [name for name in names if states[name] != "unchanged"]
    backup = _back_up(room, [name for name in wanted if states[name] != "missing"], base)
    _copy(room, wanted, base)
    return Restored(tuple(wanted), backup)


def status(phase: str, root: Path | None = None) -> Mapping[str, State]:
    """State of each file of the framework and of the learner's folder, by path relative to the room."""
    room, base = _room(phase, root)
    home, mine = framework_of(room, base), workspace_of(room, base)
    origin = _origins(base).get(room, {})
    states: dict[str, State] = {}
    for name in _files(home):
        if not (mine / name).is_file():
            states[name] = "missing"
        elif _digest(mine / name) == _digest(home / name):
            states[name] = "unchanged"
        else:
            states[name] = "outdated" if origin.get(name) == _digest(mine / name) else "changed"
    return states | {name: "added" for name in _files(mine) if name not in states}


def digest(room: str, root: Path | None = None) -> str:
    """Twelve hexadecimal digits that name the state of a learner's folder; empty when there is none."""
    mine = workspace_of(room, root)
    files = _files(mine)
    text = "".join(f"{name} {_digest(mine / name)}\n" for name in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if files else ""


def _room(phase: str, root: Path | None) -> tuple[str, Path]:
    base = root or rooms.ROOT
    room = rooms.room(phase, base)
    if not framework_of(room, base).is_dir():
        raise CourseError(f"{rooms.phase(room)} has no framework to start from: nothing to do there")
    return room, base


def _files(folder: Path) -> list[str]:
    # __init__.py makes the framework importable; the learner's folder gets its package from loader.py.
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    hidden = ("__pycache__", "__init__.py")
    return sorted(str(name) for name in found if not any(piece in hidden or piece[0] == "." for piece in name.parts))


def _copy(room: str, names: list[str], base: Path) -> None:
    origins = _origins(base)
    for name in names:
        target = workspace_of(room, base) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(framework_of(room, base) / name, target)
        origins.setdefault(room, {})[name] = _digest(target)
    if names:
        write_atomically(base / WORKSPACE / ".origin.json", json.dumps(origins, indent=1, sort_keys=True) + "\n")


def _back_up(room: str, names: list[str], base: Path) -> Path | None:
    if not names:
        return None
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S.%f")
    folder = base / WORKSPACE / ".backup" / stamp / room
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(workspace_of(room, base) / name, folder / name)
    return folder


def _origins(base: Path) -> dict[str, dict[str, str]]:
    try:
        origins = json.loads((base / WORKSPACE / ".origin.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # unknown origins only mean that an old copy counts as changed, which is the safe side
    return origins if isinstance(origins, dict) else {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _dotted(name: str) -> str:
    return ".".join(Path(name).with_suffix("").parts)
