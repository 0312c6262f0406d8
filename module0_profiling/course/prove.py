"""Prove that a course is one: run in CI for each room that has a framework.

1. Framework and solution have the same interface (signatures.py).
2. No answer is in the framework (leaks.py).
3. Each `# TASK N.k` has a ladder of at least three hints and a gate, and the other way round.
4. The framework passes the gates marked `passes`, and fails those marked `fails` by its value, not by a crash; the
   solution passes all. Ratios only where asked: a shared CI machine measures none.
5. Each planted bug is caught (planted.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.course import gates, hints, leaks, marks, needs, planted, signatures
from module0_profiling.course.errors import CourseError
from module0_profiling.course.grade import Outcome, grade
from module0_profiling.course.parts import Use, framework_of

LADDER = 3
PLAIN_NEEDS = re.compile(r"cpu|cuda(:\d+)?|triton|nvcc|amx|compiler|rust|vllm-peer")


@dataclass(frozen=True)
class Proof:
    """What proving found.

    Attributes:
        problems: one line each; empty means proven.
        notes: what could not be checked here, such as gates that need a GPU.
        caught, planted: planted bugs that were caught, of how many.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    caught: int = 0
    planted: int = 0


def taught(root: Path | None = None) -> list[str]:
    """The rooms that have a framework, hence something to prove."""
    return [room for room in rooms.discover(root) if framework_of(room, root).is_dir()]


def prove(phase: str, *, root: Path | None = None, ratios: bool = False, workers: int = 2) -> Proof:
    """All five proofs of a phase."""
    room = rooms.room(phase, root)
    problems = signatures.problems(room, root) + leaks.problems(room, root) + loose_tasks(room, root)
    graded, notes = gates_as_promised(room, root, ratios=ratios)
    hunted = uncaught(room, root, workers=workers)
    return Proof(tuple(problems + graded) + hunted.problems, tuple(notes), hunted.caught, hunted.planted)


def loose_tasks(room: str, root: Path | None = None) -> list[str]:
    """Tasks whose mark, hints and gates do not belong together, and needs that no package list knows."""
    marked = {mark.task for mark in marks.find(framework_of(room, root))}
    ladders = hints.load(room, root)
    rows = gates.load(room, root)
    graded = {gate.task for gate in rows}
    short, found = rooms.phase(room), []
    for task in sorted(marked | set(ladders) | graded):
        if task not in marked:
            found.append(f"{short}: task {task} has no TASK mark in framework/")
        if task not in graded:
            found.append(f"{short}: task {task} has no gate in gates.toml")
        if len(ladders.get(task, ())) < LADDER:
            found.append(f"{short}: task {task} has {len(ladders.get(task, ()))} hints, it needs {LADDER}")
    project = (root or rooms.ROOT) / "pyproject.toml"
    declared = re.sub(r"[-_.]+", "_", project.read_text(encoding="utf-8").lower()) if project.is_file() else None
    for gate in rows:
        for need in needs.split(gate.needs):
            if (
                declared is not None
                and not PLAIN_NEEDS.fullmatch(need)
                and re.sub(r"[-_.]+", "_", need) not in declared
            ):
                found.append(
                    f"{short}: gate {gate.id} needs {need}, which pyproject.toml does not know: a misspelling?"
                )
    return found


def gates_as_promised(
    room: str, root: Path | None = None, *, ratios: bool = False, tests_of: Sequence[str] = ("framework", "solution")
) -> tuple[list[str], list[str]]:
    """Problems with the gates of framework and solution, and notes on those that this machine cannot measure.

    Args:
        ratios: whether ratios are measured, too.
        tests_of: whose gates that name a test are graded. Where all tests run anyway, on the solution, it need not be.
    """
    found = [gate for gate in gates.load(room, root) if ratios or gate.kind != "ratio"]
    problems, notes = [], []
    for implementation in ("framework", "solution"):
        rows = [gate for gate in found if not gate.pytest or implementation in tests_of]
        use = Use.parse(f"{room}={implementation}", root)
        for outcome in grade(rows, room, use, root, wait=False):
            problem = _broken_promise(outcome, implementation)
            name = f"{rooms.phase(room)} {implementation}: gate {outcome.gate.id}"
            if outcome.status == "not measured":
                notes.append(f"{name} is not measured here: {outcome.detail}")
            elif problem:
                problems.append(f"{name} {problem}")
    return problems, notes


def uncaught(room: str, root: Path | None = None, *, workers: int = 2) -> Proof:
    """Hunt the planted bugs; a problem for each that gets away."""
    try:
        verdicts = planted.hunt(room, root, workers=workers)
    except CourseError as error:
        return Proof((str(error),))
    problems = tuple(
        f"{rooms.phase(room)}: not caught by {verdict.bug.caught_by}: {verdict.bug.file}: {verdict.bug.replace!r} "
        f"({verdict.bug.why}): {verdict.detail}"
        for verdict in verdicts
        if not verdict.caught
    )
    if not verdicts:
        problems = (f"{rooms.phase(room)}: planted.toml plants no bug, so no test is proven",)
    return Proof(problems, caught=len(verdicts) - len(problems) if verdicts else 0, planted=len(verdicts))


def _broken_promise(outcome: Outcome, implementation: str) -> str:
    wanted = "passed" if implementation == "solution" or outcome.gate.framework == "passes" else "failed"
    if outcome.crashed and outcome.status == "failed":
        return f"crashed: {outcome.detail}"
    if outcome.status != wanted:
        return f"{outcome.status} ({outcome.value}, threshold {outcome.gate.threshold}), it should have {wanted}"
    return ""
