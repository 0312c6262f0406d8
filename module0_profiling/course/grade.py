"""Grade an implementation: run its gates, one outcome each.

A gate that cannot be measured here is never passed; neither is one that crashed, nor a count or ratio of a task whose
exact gate failed (fast and wrong is wrong).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from module0_profiling import rooms
from module0_profiling.course import needs, nodes
from module0_profiling.course.errors import CannotMeasure, CourseError, blame
from module0_profiling.course.gates import Gate, Measured
from module0_profiling.course.parts import Use, framework_of, package_of, workspace_of

Status = Literal["passed", "failed", "not measured", "waiting"]
PASSED, FAILED, NOTHING_MEASURED = 0, 1, 3


@dataclass(frozen=True)
class Outcome:
    """What became of a gate.

    Attributes:
        value: the measured number; None when there is none.
        detail: what the measure said, why it failed, or what is missing.
        spread: of the rounds of a ratio.
        crashed: it failed by an error, not by its value.
    """

    gate: Gate
    status: Status
    value: float | None = None
    detail: str = ""
    spread: float | None = None
    crashed: bool = False


def grade(
    gates: Iterable[Gate],
    room: str,
    use: Use,
    root: Path | None = None,
    *,
    starting: Callable[[Gate], None] = lambda gate: None,
    wait: bool = True,
) -> Iterator[Outcome]:
    """Outcomes of gates, in their order, each as soon as it is known.

    Args:
        gates: as gates.load orders them.
        room: package of the phase.
        use: the implementations to grade.
        starting: called with each gate before it runs, to show which one takes long.
        wait: leave out the counts and ratios of a task after its exact gate failed.
    """
    use = use.complete(root)
    wrong: dict[str, str] = {}
    for gate in gates:
        starting(gate)
        missing = needs.absent(gate.needs) or (needs.absent("pytest") if gate.pytest else None)
        if missing:
            yield Outcome(gate, "not measured", detail=missing)
            continue
        if wait and gate.task in wrong and gate.kind != "exact":
            yield Outcome(gate, "waiting", detail=f"gate {wrong[gate.task]} of the same task must pass first")
            continue
        run = _run_tests if gate.pytest else _measure
        outcome = run(gate, room, use, root or rooms.ROOT)
        if outcome.status == "failed" and gate.kind == "exact":
            wrong.setdefault(gate.task, gate.id)
        yield outcome


def exit_status(outcomes: Iterable[Outcome]) -> int:
    """0: something passed and nothing failed; 1: a gate failed; 3: nothing could be measured here."""
    states = {outcome.status for outcome in outcomes}
    if states & {"failed", "waiting"}:
        return FAILED
    return PASSED if "passed" in states else NOTHING_MEASURED


def last_recorded(gate: Gate, room: str, root: Path | None = None) -> str:
    """The newest figure on record for a gate with its provenance: a line to show where it cannot be measured."""
    from module0_profiling.results import ResultError, load_all

    try:
        results = load_all(rooms.phase(room), root)
    except ResultError as error:
        return str(error)
    known = [(result, figure) for result in results.values() if (figure := result.figure(gate.id))]
    if not known:
        return "never recorded"
    result, figure = max(known, key=lambda pair: pair[0].date)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))
    machine = _machine(result.device)
    return (
        f"last recorded {figure.value:.4g} {figure.unit} on {machine} ({versions}; {result.commit[:12]}; {result.date})"
    )


def record(outcomes: Iterable[Outcome], room: str, command: str, root: Path | None = None) -> list[Path]:
    """Write measured values to reports/results, one file for each set of needs (`gates-cpu`, `gates-cuda`).

    So a run on a machine without a GPU does not erase the figures of one that had it.
    """
    from module0_profiling.results import Figure
    from module0_profiling.results import record as write

    files: dict[str, list[Figure]] = {}
    for outcome in outcomes:
        if outcome.value is not None and math.isfinite(outcome.value) and not outcome.crashed:
            gate = outcome.gate
            figure = Figure(gate.id, outcome.value, gate.unit, outcome.spread, f"{gate.metric}, {gate.threshold}")
            files.setdefault(
                "gates-" + "-".join(needs.split(gate.needs)).replace(":", "").replace(".", "-"), []
            ).append(figure)
    return [write(rooms.phase(room), name, figures, command=command, root=root) for name, figures in files.items()]


def _measure(gate: Gate, room: str, use: Use, root: Path) -> Outcome:
    try:
        answer = gate.function()(use)
        measured = answer if isinstance(answer, Measured) else Measured(_number(answer, gate))
    except CannotMeasure as error:
        return Outcome(gate, "not measured", detail=str(error))
    except CourseError as error:
        return Outcome(gate, "failed", detail=str(error), crashed=True)
    except (Exception, SystemExit) as error:
        homes = (workspace_of(room, root), framework_of(room, root), package_of(room, root))
        return Outcome(gate, "failed", detail=blame(error, homes, root), crashed=True)
    status: Status = "passed" if gate.holds(measured.value) else "failed"
    return Outcome(gate, status, measured.value, measured.detail, measured.spread)


def _number(answer: object, gate: Gate) -> float:
    # int, float, numpy and zero-dimensional tensors count; None and bool are a measure that forgot its answer.
    if answer is None or isinstance(answer, bool) or not hasattr(answer, "__float__"):
        raise CourseError(f"{gate.measure} returned {answer!r}, it must return a number")
    return float(answer)


def _run_tests(gate: Gate, room: str, use: Use, root: Path) -> Outcome:
    run = nodes.run((gate.pytest,), use=str(use), root=root)
    if run.broken:
        return Outcome(gate, "failed", detail=f"{gate.pytest}: {run.broken}", crashed=True)
    if not run.passed and not run.failed:
        return Outcome(gate, "not measured", detail=f"all tests were skipped: {run.why_skipped}")
    counts = f"{run.passed} passed" + f", {run.skipped} skipped" * bool(run.skipped)
    status: Status = "passed" if gate.holds(run.failed) else "failed"
    detail = f"{counts}; {run.first}" if run.failed else counts
    return Outcome(gate, status, float(run.failed), detail, crashed=not run.asserted)


def _machine(device: object) -> str:
    if not isinstance(device, dict):
        return str(device)
    for key in ("gpu", "cpu", "name"):
        value = device.get(key)
        if isinstance(value, dict):
            value = value.get("name")
        if value:
            return str(value)
    return ", ".join(f"{key} {value}" for key, value in device.items()) or "an unnamed machine"
