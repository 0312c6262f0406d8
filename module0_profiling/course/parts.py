"""A part has three homes; a `Use` says which one each phase takes.

    solution   phase0_prototype/kv_cache.py
    framework  phase0_prototype/framework/kv_cache.py     the starting point: right but slow
    mine       workspace/phase0_prototype/kv_cache.py     the learner's copy of the framework

A part is a `.py` or `.cu` file of the framework; everything else in a room has one home only. A phase that a `Use` does
not mention takes `mine` where the learner has started it, else `solution`. A part that is missing in the workspace is
taken from the framework, never from the solution: code that the learner did not write must not earn a gate.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from module0_profiling import rooms
from module0_profiling.course import loader
from module0_profiling.course.errors import CourseError, LearnerCodeError, blame

IMPLEMENTATIONS = ("mine", "framework", "solution")
SUFFIXES = (".py", ".cu")


@dataclass(frozen=True)
class Use:
    """Which implementation each room takes.

    Attributes:
        choices: (room, implementation) pairs, in the order of the rooms. A room that is absent takes the default.
    """

    choices: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, root: Path | None = None) -> Use:
        """Read `phase2=mine,phase3=framework`; an empty text means all defaults.

        Raises:
            CourseError: for an unknown phase or implementation, or a phase named twice.
        """
        chosen: dict[str, str] = {}
        for item in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, implementation = (piece.strip() for piece in item.partition("="))
            if not equals:
                raise CourseError(f"{item!r} is not a choice: write phase=implementation, as in phase0=mine")
            try:
                room = rooms.room(name, root)
            except rooms.UnknownPhaseError as error:
                raise CourseError(str(error)) from None
            if room in chosen:
                raise CourseError(f"{name} is chosen twice in {text!r}: name each phase once")
            chosen[room] = _known(implementation)
        order = rooms.discover(root)
        return cls(tuple(sorted(chosen.items(), key=lambda choice: order.index(choice[0]))))

    @classmethod
    def from_env(
        cls,
        phase: str,
        *,
        default: str | None = None,
        env: Mapping[str, str] | None = None,
        root: Path | None = None,
    ) -> Use:
        """Read `IMPL`: `mine` speaks about `phase`; `phase0=mine,phase1=framework` about the phases that it names.

        Args:
            phase: the phase that is being graded or tested.
            default: the implementation of `phase` when `IMPL` says nothing of it (tests pass "solution").
        """
        text = (os.environ if env is None else env).get("IMPL", "").strip()
        use = cls.parse(text, root) if "=" in text else cls()
        room = rooms.room(phase, root)
        if text and "=" not in text:
            return use.choose(room, text, root)
        if default is not None and room not in dict(use.choices):
            return use.choose(room, default, root)
        return use

    def choose(self, phase: str, implementation: str, root: Path | None = None) -> Use:
        """The same Use with one phase's implementation replaced."""
        kept = [f"{room}={chosen}" for room, chosen in self.choices if room != rooms.room(phase, root)]
        return Use.parse(",".join([*kept, f"{phase}={implementation}"]), root)

    def of(self, room: str, root: Path | None = None) -> str:
        """The implementation that a room takes: the one chosen, else mine where it was started, else solution."""
        chosen = dict(self.choices).get(room)
        if chosen:
            return chosen
        return "mine" if workspace_of(room, root).is_dir() else "solution"

    def complete(self, root: Path | None = None) -> Use:
        """The same Use with every phase's default written out, fit to hand to another process."""
        phases = [room for room in rooms.discover(root) if framework_of(room, root).is_dir()]
        return Use.parse(",".join(f"{room}={self.of(room, root)}" for room in phases), root)

    def __str__(self) -> str:
        return ",".join(f"{rooms.phase(room)}={implementation}" for room, implementation in self.choices)


def available(room: str, root: Path | None = None) -> list[str]:
    """The parts of a room: dotted names of the .py and .cu files of its framework, without `__init__` and the like."""
    home = framework_of(room, root)
    files = [path.relative_to(home) for suffix in SUFFIXES for path in home.rglob(f"*{suffix}")]
    return sorted({".".join(file.with_suffix("").parts) for file in files if not file.name.startswith("__")})


def resolve(room: str, part: str, use: Use, root: Path | None = None) -> ModuleType:
    """The module of a part, of the implementation that `use` says.

    Raises:
        CourseError: the room has no such part, it is not Python, or `mine` is asked for and was never started.
        LearnerCodeError: the learner's file does not import; one line with file, line and error.
    """
    _check_part(room, part, root)
    if not framework_of(room, root).joinpath(*part.split(".")).with_suffix(".py").is_file():
        raise CourseError(f"{part} of {room} is not a Python module: ask parts.path for its file")
    implementation = use.of(room, root)
    if implementation == "solution":
        return importlib.import_module(f"{room}.{part}")
    if implementation == "framework":
        return importlib.import_module(f"{room}.framework.{part}")
    homes = _homes(room, "mine", root)
    try:
        return loader.load(room, part, homes)
    except Exception as error:
        raise LearnerCodeError(blame(error, homes, root or rooms.ROOT)) from error


def path(room: str, part: str, use: Use, suffix: str = ".py", root: Path | None = None) -> Path:
    """The source file of a part, for parts that are not imported (`.cu`).

    Raises:
        CourseError: the room has no such part, or the implementation has no such file.
    """
    _check_part(room, part, root)
    relative = Path(*part.split(".")).with_suffix(suffix)
    homes = _homes(room, use.of(room, root), root)
    for home in homes:
        if (home / relative).is_file():
            return home / relative
    raise CourseError(f"{homes[0] / relative} does not exist: {part} has no {suffix} file in {use.of(room, root)}")


def describe(use: Use, root: Path | None = None) -> str:
    """The line that a command prints first: `phase0: mine (workspace/phase0_prototype), phase1: solution`.

    Files that the learner's folder lacks, and which therefore come from the framework, are named.
    """
    base = root or rooms.ROOT
    told = []
    for room, implementation in use.complete(root).choices:
        where = ""
        if implementation == "framework":
            where = f" ({framework_of(room, root).relative_to(base)})"
        if implementation == "mine":
            missing = ", ".join(_missing(room, root))
            where = (
                f" ({workspace_of(room, root).relative_to(base)}{f'; from the framework: {missing}' * bool(missing)})"
            )
        told.append(f"{rooms.phase(room)}: {implementation}{where}")
    return ", ".join(told)


def package_of(room: str, root: Path | None = None) -> Path:
    """The folder of a room, home of its solution."""
    return (root or rooms.ROOT) / room


def framework_of(room: str, root: Path | None = None) -> Path:
    """The folder of a room's framework, whether or not it exists."""
    return package_of(room, root) / "framework"


def workspace_of(room: str, root: Path | None = None) -> Path:
    """The learner's folder of a room, whether or not it exists."""
    return (root or rooms.ROOT) / loader.WORKSPACE / room


def _homes(room: str, implementation: str, root: Path | None) -> tuple[Path, ...]:
    if implementation == "solution":
        return (package_of(room, root),)
    if implementation == "framework":
        return (framework_of(room, root),)
    mine = workspace_of(room, root)
    if not mine.is_dir():
        raise CourseError(f"{rooms.phase(room)}=mine, but it was never started: make start-{rooms.phase(room)}")
    return mine, framework_of(room, root)


def _missing(room: str, root: Path | None) -> list[str]:
    home, mine = framework_of(room, root), workspace_of(room, root)
    files = [path.relative_to(home) for suffix in SUFFIXES for path in sorted(home.rglob(f"*{suffix}"))]
    return [str(file) for file in files if not file.name.startswith("__") and not (mine / file).is_file()]


def _known(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise CourseError(f"unknown implementation {implementation!r}: choose {', '.join(IMPLEMENTATIONS)}")
    return implementation


def _check_part(room: str, part: str, root: Path | None) -> None:
    known = available(room, root)
    if part not in known:
        raise CourseError(f"{room} has no part {part!r}: its parts are {', '.join(known) or 'none'}")
