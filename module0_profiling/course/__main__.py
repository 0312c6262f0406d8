"""`python -m module0_profiling.course ROOT PHASE GATE`: grade one gate in a process of its own, as IMPL says.

planted.py runs it in a copy of the repository. Status: 0 passed, 1 failed, 3 not measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.course import gates
from module0_profiling.course.grade import exit_status, grade
from module0_profiling.course.parts import Use


def main(root: Path, phase: str, gate_id: str) -> int:
    """Grade a gate and print its outcome; return the exit status."""
    room = rooms.room(phase, root)
    gate = next(gate for gate in gates.load(phase, root) if gate.id == gate_id)
    outcomes = list(grade([gate], room, Use.from_env(phase, root=root), root))
    for outcome in outcomes:
        print(outcome.status, outcome.value, outcome.detail)
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
