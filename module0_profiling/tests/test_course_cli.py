from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from module0_profiling import rooms
from module0_profiling.course import commands, hints, progress
from module0_profiling.course.errors import CourseError
from module0_profiling.tests import fake_course


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_course.build(tmp_path, monkeypatch)


class Titan:
    """The learner's commands on one course."""

    def __init__(self, root: Path) -> None:
        self.app = typer.Typer()
        commands.register(self.app, root)

    def __call__(self, line: str, status: int = 0) -> str:
        result = CliRunner().invoke(self.app, line.split())
        assert result.exit_code == status, result.output
        return result.output


@pytest.fixture
def titan(root: Path) -> Titan:
    return Titan(root)


CHECK = "check phase0 --only"


def test_the_learners_path_from_start_to_report_card(root: Path, titan: Titan) -> None:
    assert "1 files copied" in titan("start phase0")
    output = titan("check phase0", 1)
    assert "phase0: mine (workspace/phase0_alpha), phase1: solution" in output
    assert "0.1 [exact] right\n    PASSED wrong sums: 0, needed == 0\n" in output
    assert "0.2 [count] few additions\n    FAILED additions: 55, needed == 10 (10 numbers)\n" in output
    assert "task 0.1: Ten numbers need ten additions." in output
    assert "for a hint: titan hint phase0 0.1" in output
    absent = "NOT MEASURED HERE needs the Python package no_such_package, it is not installed; never recorded"
    assert f"0.4 [ratio] fast on a machine that nobody has\n    {absent}\n" in output
    assert "2 passed, 2 failed, 1 not measured" in output
    assert "task 0.1, hint 1 of 3" in titan("hint phase0")

    fake_course.solve(root)
    assert "4 passed, 1 not measured" in titan("check phase0")
    assert "report_card.md" in titan("card")
    card = (root / "workspace/report_card.md").read_text(encoding="utf-8")
    assert "4 of 5 gates passed." in card
    assert "| 0.2 | few additions | == 10 | 10 | passed |" in card
    assert "| 0.4 | fast on a machine that nobody has | >= 0 x |  | not measured |" in card
    assert "Hints taken: task 0.1: 1." in card
    machine = json.loads((root / "workspace/report_card.json").read_text(encoding="utf-8"))["machine"]
    assert machine


def test_the_status_is_3_when_nothing_could_be_measured(titan: Titan) -> None:
    titan(f"{CHECK} 0.4 --use phase0=solution", 3)


def test_impl_chooses_what_is_graded(titan: Titan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPL", "framework")
    assert "phase0: framework" in titan(f"{CHECK} 0.2", 1)
    monkeypatch.setenv("IMPL", "solution")
    titan(f"{CHECK} 0.2")


def test_figures_of_the_solution_are_recorded_on_request(root: Path, titan: Titan) -> None:
    titan(f"{CHECK} 0.2 --use phase0=solution --record")
    data = json.loads((root / "reports/results/phase0/gates-cpu.json").read_text(encoding="utf-8"))
    assert [(figure["name"], figure["value"]) for figure in data["figures"]] == [("0.2", 10)]
    assert "add --use phase0=solution" in titan(f"{CHECK} 0.2 --use phase0=framework --record", 2)


def test_what_was_graded_before_ctrl_c_stays_graded(root: Path, titan: Titan) -> None:
    titan("start phase0")
    mine = root / "workspace/phase0_alpha/sums.py"
    mine.write_text(
        "def prefix_sums(numbers, add):\n    if add(1, 1) == 2: raise KeyboardInterrupt\n", encoding="utf-8"
    )
    gates = root / "phase0_alpha/gates.toml"
    fake_course.edit(gates, "phase0_alpha.checks:mismatches", "phase1_beta.checks:zero")
    fake_course.edit(gates, 'pytest = "phase0_alpha/tests/test_sums.py"', 'measure = "phase1_beta.checks:zero"')
    assert "stopped" in titan("check phase0", 130)
    assert progress.load(root).gates("phase0_alpha")["0.1"].status == "passed"


def test_only_the_learners_own_code_earns_progress(root: Path, titan: Titan) -> None:
    titan("start phase0")
    titan(f"{CHECK} 0.2 --use phase0=solution")
    assert progress.load(root).gates("phase0_alpha") == {}


def test_a_gate_that_fails_again_is_set_back(root: Path, titan: Titan) -> None:
    titan("start phase0")
    fake_course.solve(root)
    titan(f"{CHECK} 0.2")
    assert progress.table(root)[0].passed == 1
    titan("reset phase0")
    titan(f"{CHECK} 0.2", 1)
    assert (progress.table(root)[0].passed, progress.table(root)[0].failed) == (0, 1)


def test_progress_counts_every_state_and_shows_skips(root: Path, titan: Titan) -> None:
    titan("start phase0")
    titan("check phase0", 1)
    titan("hint phase0")
    titan("skip phase1")
    row, other = progress.table(root)
    assert (row.total, row.passed, row.failed, row.not_measured, row.unchecked, row.hints) == (5, 2, 2, 1, 0, 1)
    assert (other.unchecked, other.skipped) == (1, ("phase",))
    output = titan("progress")
    assert "phase0" in output and "phase1" in output


def test_a_failed_phase_does_not_block_the_next(titan: Titan) -> None:
    titan("start phase0")
    titan(f"{CHECK} 0.2", 1)
    titan("start phase1")
    titan("check phase1")


def test_skips_are_marked_and_taken_back(root: Path, titan: Titan) -> None:
    titan("skip phase0 0.1")
    assert progress.load(root).phase("phase0_alpha").skipped == ("0.1",)
    titan("skip phase0 0.1 --undo")
    assert progress.load(root).phase("phase0_alpha").skipped == ()
    assert "its tasks are 0.1" in titan("skip phase0 0.9", 2)


def test_hints_climb_the_ladder_and_the_last_one_is_repeated(root: Path, titan: Titan) -> None:
    texts = [titan("hint phase0 0.1") for _ in range(4)]
    assert [text.splitlines()[-1] for text in texts] == [f"hint number {level}" for level in (1, 2, 3, 3)]
    assert "again" in texts[3]
    assert progress.load(root).hints("phase0_alpha") == {"0.1": 3}


def test_without_a_check_a_hint_needs_a_task(titan: Titan) -> None:
    assert "not checked yet: make check-phase0" in titan("hint phase0", 2)
    assert "its tasks are 0.1" in titan("hint phase0 0.7", 2)


def test_a_ladder_with_a_missing_rung_is_rejected(root: Path) -> None:
    fake_course.edit(root / "phase0_alpha/hints.toml", "level = 2", "level = 4")
    with pytest.raises(CourseError, match=r"task 0.1 has the levels \[1, 3, 4\]"):
        hints.load("phase0", root)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"phases": {"phase0_alpha": 3}}'])
def test_corrupt_progress_is_put_aside_with_one_line(
    root: Path, titan: Titan, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_course.write(root / "workspace/.progress.json", text)
    assert progress.load(root) == progress.State()
    assert capsys.readouterr().err.count("\n") == 1
    assert (root / "workspace/.progress.json.corrupt").read_text(encoding="utf-8") == text
    titan("skip phase0")
    assert progress.load(root).phase("phase0_alpha").skipped == ("phase",)


@pytest.mark.parametrize("line", ["start phase9", "check phase9", "hint phase9", "reset phase9", "skip phase9"])
def test_an_unknown_phase_is_one_line_that_lists_the_phases(titan: Titan, line: str) -> None:
    assert titan(line, 2).strip() == "there is no phase 'phase9': the phases are phase0, phase1"


def test_a_user_mistake_is_one_line(titan: Titan) -> None:
    assert titan("check phase0 --use phase0=yours", 2).count("\n") == 1
    assert "0.1, 0.1-tests, 0.2, 0.3, 0.4" in titan("check phase0 --only 0.7", 2)


def test_the_proof_is_a_command_whose_status_is_the_verdict(titan: Titan) -> None:
    output = titan("check phase1 --prove", 1)
    assert "PROBLEM phase1: task 1.1 has 1 hints, it needs 3" in output


def test_registering_the_commands_imports_nothing_heavy() -> None:
    code = (
        "import sys, typer; from module0_profiling.course.commands import register; register(typer.Typer());"
        "print([name for name in ('torch', 'numpy', 'pandas', 'rich.table', 'tomllib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=rooms.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
