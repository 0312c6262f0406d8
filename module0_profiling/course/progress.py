"""What the learner has done so far, in `workspace/.progress.json`.

Only the learner's own code earns progress: a check of the framework or the solution is not recorded. Nothing here
blocks: a phase may be checked whatever became of the one before. A gate that fails after it had passed counts as
failed again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from module0_profiling import rooms
from module0_profiling.course import gates as gate_rows
from module0_profiling.course.errors import CourseError
from module0_profiling.course.grade import Outcome
from module0_profiling.course.loader import WORKSPACE
from module0_profiling.course.parts import framework_of
from module0_profiling.course.workspace import digest
from module0_profiling.results import write_atomically


@dataclass(frozen=True)
class Record:
    """The last outcome of a gate.

    Attributes:
        code: digest of the learner's folder that was graded.
    """

    status: str
    value: float | None
    detail: str
    date: str
    code: str


@dataclass(frozen=True)
class PhaseState:
    """Progress in one room: gate id -> record, task -> hints taken, and what was skipped (`phase` or a task)."""

    gates: Mapping[str, Record] = field(default_factory=dict)
    hints: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """Progress in every room; methods return a changed copy."""

    phases: Mapping[str, PhaseState] = field(default_factory=dict)

    def phase(self, room: str) -> PhaseState:
        """Progress in a room, empty when there is none."""
        return self.phases.get(room, PhaseState())

    def gates(self, room: str) -> Mapping[str, Record]:
        """Last outcome of each gate that was ever checked."""
        return self.phase(room).gates

    def hints(self, room: str) -> Mapping[str, int]:
        """Hints taken by task."""
        return self.phase(room).hints

    def with_outcomes(self, room: str, outcomes: Iterable[Outcome], code: str) -> State:
        """With the outcomes of a check in place of earlier ones of the same gates."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        told = {
            outcome.gate.id: Record(outcome.status, outcome.value, outcome.detail, now, code) for outcome in outcomes
        }
        return self._with(room, replace(self.phase(room), gates={**self.gates(room), **told}))

    def with_hints(self, room: str, task: str, count: int) -> State:
        """With `count` hints of a task taken."""
        return self._with(room, replace(self.phase(room), hints={**self.hints(room), task: count}))

    def with_skip(self, room: str, what: str, skipped: bool) -> State:
        """With a task, or the whole `phase`, marked as skipped or not."""
        rest = tuple(mark for mark in self.phase(room).skipped if mark != what)
        return self._with(room, replace(self.phase(room), skipped=(*rest, what) if skipped else rest))

    def _with(self, room: str, phase: PhaseState) -> State:
        return State({**self.phases, room: phase})


@dataclass(frozen=True)
class Row:
    """A phase in the table of progress: how many gates are in each state, hints taken, skip marks."""

    phase: str
    total: int
    passed: int
    failed: int
    not_measured: int
    unchecked: int
    hints: int
    skipped: tuple[str, ...]


def load(root: Path | None = None) -> State:
    """Read the progress; a file that cannot be read is put aside with one line on stderr, and progress starts anew."""
    path = path_of(root)
    if not path.exists():
        return State()
    try:
        phases = json.loads(path.read_text(encoding="utf-8"))["phases"]
        return State({room: _phase(data) for room, data in phases.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        aside = path.with_name(path.name + ".corrupt")
        path.replace(aside)
        print(f"{path} is not readable: kept as {aside.name}, progress starts anew", file=sys.stderr)
        return State()


def save(state: State, root: Path | None = None) -> Path:
    """Write the progress; a reader sees the old file or the new one."""
    path = path_of(root)
    write_atomically(path, json.dumps(asdict(state), indent=1, sort_keys=True) + "\n")
    return path


def note(phase: str, outcomes: Iterable[Outcome], root: Path | None = None) -> None:
    """Remember the outcomes of a check of the learner's code."""
    room = rooms.room(phase, root)
    save(load(root).with_outcomes(room, outcomes, digest(room, root)), root)


def skip(phase: str, task: str | None = None, *, undo: bool = False, root: Path | None = None) -> str:
    """Mark a task, or a whole phase, as skipped; return what was marked.

    Raises:
        CourseError: the phase has no such task.
    """
    room = rooms.room(phase, root)
    tasks = sorted({gate.task for gate in gate_rows.load(phase, root)})
    if task is not None and task not in tasks:
        raise CourseError(f"{phase} has no task {task}: its tasks are {', '.join(tasks)}")
    save(load(root).with_skip(room, task or "phase", not undo), root)
    return f"task {task} of {rooms.phase(room)}" if task else rooms.phase(room)


def table(root: Path | None = None) -> list[Row]:
    """A row for each phase that has a framework. A waiting gate counts as failed: it has something to wait for."""
    state = load(root)
    taught = [room for room in rooms.discover(root) if framework_of(room, root).is_dir()]
    return [_row(room, state.phase(room), root) for room in taught]


def path_of(root: Path | None = None) -> Path:
    """Where progress is kept."""
    return (root or rooms.ROOT) / WORKSPACE / ".progress.json"


def _row(room: str, phase: PhaseState, root: Path | None) -> Row:
    ids = [gate.id for gate in gate_rows.load(room, root)]
    states = [phase.gates[gate].status if gate in phase.gates else "unchecked" for gate in ids]
    return Row(
        phase=rooms.phase(room),
        total=len(ids),
        passed=states.count("passed"),
        failed=states.count("failed") + states.count("waiting"),
        not_measured=states.count("not measured"),
        unchecked=states.count("unchecked"),
        hints=sum(phase.hints.values()),
        skipped=phase.skipped,
    )


def _phase(data: dict[str, Any]) -> PhaseState:
    gates = {gate: Record(**record) for gate, record in data["gates"].items()}
    hints = {task: int(count) for task, count in data["hints"].items()}
    return PhaseState(gates, hints, tuple(str(mark) for mark in data["skipped"]))
