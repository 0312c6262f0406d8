"""What `titan check` and `titan progress` print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from module0_profiling import rooms
from module0_profiling.course import gates, progress
from module0_profiling.course.errors import CourseError
from module0_profiling.course.gates import Gate
from module0_profiling.course.grade import Outcome, exit_status, grade, last_recorded
from module0_profiling.course.grade import record as record_outcomes
from module0_profiling.course.parts import Use, describe

WORDS = {
    "passed": "[green]PASSED[/]",
    "failed": "[red]FAILED[/]",
    "not measured": "[yellow]NOT MEASURED HERE[/]",
    "waiting": "[yellow]WAITING[/]",
}


def check(phase: str, use_text: str, only: str, record: bool, root: Path | None = None) -> int:
    """Grade a phase, print each gate as it ends, remember the outcome; return the exit status.

    Args:
        use_text: `phase0=mine`, or empty to follow IMPL and then the default.
        only: a gate or task number, or empty for all gates.
        record: also write the figures to reports/results; only for the solution.
    """
    room = rooms.room(phase, root)
    use = Use.parse(use_text, root) if use_text else Use.from_env(room, root=root)
    if record and use.of(room, root) != "solution":
        short = rooms.phase(room)
        raise CourseError(f"--record keeps the figures of the solution: add --use {short}=solution")
    chosen = _chosen(room, only, root)
    console = _console()
    console.print(escape(describe(use, root)))
    outcomes: list[Outcome] = []
    try:
        for outcome in grade(chosen, room, use, root, starting=lambda gate: _announce(console, gate)):
            outcomes.append(outcome)
            _print(console, outcome, room, root)
    finally:  # also after Ctrl-C: what was graded stays graded
        if outcomes and use.of(room, root) == "mine":
            progress.note(room, outcomes, root)
    _sum_up(console, outcomes, room)
    if record:
        for path in record_outcomes(outcomes, room, f"titan check {rooms.phase(room)} --use {use} --record", root):
            console.print(f"recorded: {escape(str(path))}")
    return exit_status(outcomes)


def prove(phase: str, root: Path | None = None) -> int:
    """Prove the course of a phase, ratios included; print problems; return 0 when there are none."""
    from module0_profiling.course.prove import prove as run

    console = _console()
    with console.status("proving"):
        proof = run(phase, root=root, ratios=True)
    for note in proof.notes:
        console.print(escape(note))
    for problem in proof.problems:
        console.print(f"[red]PROBLEM[/] {escape(problem)}")
    console.print(f"{rooms.phase(rooms.room(phase, root))}: caught {proof.caught}/{proof.planted} planted bugs")
    return 1 if proof.problems else 0


def show_progress(root: Path | None = None) -> None:
    """Print the table of progress."""
    table = Table("phase", *("gates", "passed", "failed", "not measured", "to check", "hints", "skipped"))
    for row in progress.table(root):
        counts = (row.total, row.passed, row.failed, row.not_measured, row.unchecked, row.hints)
        table.add_row(row.phase, *(str(count) for count in counts), ", ".join(row.skipped))
    _console().print(table)


def _chosen(room: str, only: str, root: Path | None) -> list[Gate]:
    known = gates.load(room, root)
    chosen = [gate for gate in known if not only or only in (gate.id, gate.task)]
    if not chosen:
        raise CourseError(f"{rooms.phase(room)} has no gate or task {only}: {', '.join(gate.id for gate in known)}")
    return chosen


def _announce(console: Console, gate: Gate) -> None:
    # Printed before the gate runs, so that a long one is seen. No spinner: a measure may show progress itself.
    console.print(escape(f"{gate.id} [{gate.kind}] {gate.title}"))


def _print(console: Console, outcome: Outcome, room: str, root: Path | None) -> None:
    gate, said = outcome.gate, outcome.detail
    if outcome.value is not None:
        unit = f" {gate.unit}" if gate.unit else ""
        detail = f" ({said})" if said else ""
        said = f"{gate.metric}: {_number(outcome.value)}{unit}, needed {gate.threshold}{unit}{detail}"
    if outcome.status == "not measured":
        said += f"; {last_recorded(gate, room, root)}"
    console.print(f"    {WORDS[outcome.status]} {escape(said)}")
    if outcome.status == "failed":
        console.print(escape(f"    task {gate.task}: {gate.because}"))
        console.print(escape(f"    for a hint: titan hint {rooms.phase(room)} {gate.task}"))


def _number(value: float) -> str:
    """Counts in full (21,500), measurements with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _sum_up(console: Console, outcomes: Sequence[Outcome], room: str) -> None:
    states = [outcome.status for outcome in outcomes]
    counts = [
        f"{states.count(name)} {name}" for name in ("passed", "failed", "waiting", "not measured") if name in states
    ]
    console.print(f"{rooms.phase(room)}: {', '.join(counts)}")


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)
