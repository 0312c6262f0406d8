"""The learner's report card: figures, machine, hints taken and date of each phase, as Markdown and as JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from module0_profiling import rooms
from module0_profiling.course import gates, progress
from module0_profiling.course.loader import WORKSPACE
from module0_profiling.course.parts import framework_of
from module0_profiling.results import versions_of, write_atomically


def collect(root: Path | None = None) -> dict[str, Any]:
    """The card as plain data: date, machine, versions, and for each phase its gates with the learner's figures."""
    from module0_profiling.hardware import describe_machine

    state = progress.load(root)
    taught = [room for room in rooms.discover(root) if framework_of(room, root).is_dir()]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": versions_of(("torch", "triton", "transformers")),
        "phases": {rooms.phase(room): _phase(room, state.phase(room), root) for room in taught},
    }


def write(root: Path | None = None) -> Path:
    """Write `workspace/report_card.md` and `.json`; return the path of the Markdown."""
    card = collect(root)
    path = (root or rooms.ROOT) / WORKSPACE / "report_card.md"
    write_atomically(path.with_suffix(".json"), json.dumps(card, indent=1, sort_keys=True) + "\n")
    write_atomically(path, markdown(card))
    return path


def markdown(card: dict[str, Any]) -> str:
    """The card as Markdown: one table a phase."""
    machine = "; ".join(f"{key}: {_plain(value)}" for key, value in card["machine"].items() if value not in (None, ""))
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    lines = ["# Report card", "", f"{card['date']}. {machine}. {versions}.", ""]
    for phase, data in card["phases"].items():
        counts = [row["status"] for row in data["gates"]]
        lines += [f"## {phase}", "", f"{counts.count('passed')} of {len(counts)} gates passed.", ""]
        if data["skipped"]:
            lines += [f"Skipped: {', '.join(data['skipped'])}.", ""]
        if data["hints"]:
            taken = ", ".join(f"task {task}: {count}" for task, count in sorted(data["hints"].items()))
            lines += [f"Hints taken: {taken}.", ""]
        lines += ["| gate | what | needed | measured | status | date |", "|---|---|---|---|---|---|"]
        lines += [_line(row) for row in data["gates"]] + [""]
    return "\n".join(lines)


def _phase(room: str, phase: progress.PhaseState, root: Path | None) -> dict[str, Any]:
    rows = []
    for gate in gates.load(room, root):
        record = phase.gates.get(gate.id, progress.Record("not checked", None, "", "", ""))
        rows.append(
            {
                "id": gate.id,
                "title": gate.title,
                "metric": gate.metric,
                "threshold": gate.threshold,
                "unit": gate.unit,
                "status": record.status,
                "value": record.value,
                "detail": record.detail,
                "date": record.date,
                "code": record.code,
            }
        )
    return {"gates": rows, "hints": dict(phase.hints), "skipped": list(phase.skipped)}


def _line(row: dict[str, Any]) -> str:
    value = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()
    cells = (
        row["id"],
        row["title"],
        f"{row['threshold']} {row['unit']}".strip(),
        value,
        row["status"],
        row["date"][:10],
    )
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
