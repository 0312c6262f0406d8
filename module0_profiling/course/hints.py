"""Ladders of hints: `hints.toml` has several for each task, from a nudge to the sketch of one function.

    [[hint]]
    task = "0.1"
    level = 1
    text = "Which of the tokens that you feed to the model were fed before?"

How many were taken is remembered (progress.py) and shown on the report card; a hint stays readable after it was taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.course import gates, progress
from module0_profiling.course.errors import CourseError
from module0_profiling.course.rows import rows


@dataclass(frozen=True)
class Hint:
    """One rung: task number, level from 1 upwards, text."""

    task: str
    level: int
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise CourseError("text is empty")


@dataclass(frozen=True)
class Taken:
    """A hint as it is shown: which of how many, and whether it was shown before."""

    hint: Hint
    of: int
    again: bool


def load(phase: str, root: Path | None = None) -> dict[str, list[Hint]]:
    """The ladder of each task, lowest level first.

    Raises:
        CourseError: levels of a task are not 1, 2, 3 ...
    """
    file = (root or rooms.ROOT) / rooms.room(phase, root) / "hints.toml"
    ladders: dict[str, list[Hint]] = {}
    for hint in rows(file, "hint", Hint):
        ladders.setdefault(hint.task, []).append(hint)
    for task, ladder in ladders.items():
        ladder.sort(key=lambda hint: hint.level)
        levels = [hint.level for hint in ladder]
        if levels != list(range(1, len(levels) + 1)):
            raise CourseError(f"{file}: task {task} has the levels {levels}, they must count from 1")
    return ladders


def take(phase: str, task: str | None = None, root: Path | None = None) -> Taken:
    """The next hint of a task, counted as taken; the last one again when the ladder is used up.

    Args:
        task: `0.1`; None means the task of the first gate that failed in the last check.

    Raises:
        CourseError: no such task, or none failed and none was named.
    """
    room = rooms.room(phase, root)
    ladders = load(phase, root)
    task = task or _failing_task(phase, root)
    if task not in ladders:
        raise CourseError(f"{phase} has no hints for task {task}: its tasks are {', '.join(sorted(ladders))}")
    ladder = ladders[task]
    state = progress.load(root)
    taken = min(state.hints(room).get(task, 0), len(ladder))
    again = taken == len(ladder)
    if not again:
        progress.save(state.with_hints(room, task, taken + 1), root)
    return Taken(ladder[min(taken, len(ladder) - 1)], len(ladder), again)


def _failing_task(phase: str, root: Path | None) -> str:
    room = rooms.room(phase, root)
    known = progress.load(root).gates(room)
    for gate in gates.load(phase, root):
        if gate.id in known and known[gate.id].status == "failed":
            return gate.task
    short = rooms.phase(room)
    if not known:
        raise CourseError(f"{short} was not checked yet: make check-{short}, or name a task: titan hint {short} <task>")
    raise CourseError(f"no gate of {short} failed in the last check: name a task: titan hint {short} <task>")
