from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from module0_profiling.course import gates, needs, workspace
from module0_profiling.course import grade as grading
from module0_profiling.course.errors import CourseError
from module0_profiling.course.grade import Outcome, exit_status, grade, last_recorded
from module0_profiling.course.parts import Use
from module0_profiling.tests import fake_course


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_course.build(tmp_path, monkeypatch)


def graded(root: Path, implementation: str, *only: str) -> dict[str, Outcome]:
    use = Use.parse(f"phase0={implementation}", root)
    chosen = [gate for gate in gates.load("phase0", root) if not only or gate.id in only]
    return {outcome.gate.id: outcome for outcome in grade(chosen, "phase0_alpha", use, root)}


def mine(root: Path, text: str) -> None:
    workspace.start("phase0", root=root)
    fake_course.write(root / "workspace/phase0_alpha/sums.py", text)


def test_gates_are_graded_exact_first_then_counts_then_ratios(root: Path) -> None:
    assert [gate.kind for gate in gates.load("phase0", root)] == ["exact", "exact", "count", "ratio", "ratio"]
    assert list(graded(root, "solution", "0.1", "0.2", "0.3")) == ["0.1", "0.2", "0.3"]


@pytest.mark.parametrize(
    ("find", "replace", "message"),
    [
        ('kind = "count"', 'kind = "counts"', r"gate 2 \(0.2\): kind 'counts'"),
        ('kind = "count"', 'kind = "count"\ntreshold = "1"', "unknown key treshold"),
        ('threshold = "== 10"', 'threshold = "10"', "threshold '10'"),
        ('threshold = "== 10"', "threshold = 10", "threshold is 10, it must be a str"),
        ('threshold = "== 10"\n', "", "threshold is missing"),
        ('needs = "cpu,no_such_package"', 'needs = "cuda:many"', "needs 'cuda:many'"),
        ('metric = "additions"', 'metric = "additions"\npytest = "x.py"', "one of measure and pytest"),
        ('id = "0.2"', 'id = "0.3"', "two gates have the id 0.3"),
        ('id = "0.2"', "id = ", "is not TOML"),
    ],
)
def test_a_bad_row_is_one_line_that_names_file_and_key(root: Path, find: str, replace: str, message: str) -> None:
    fake_course.edit(root / "phase0_alpha/gates.toml", find, replace)
    with pytest.raises(CourseError, match=f"phase0_alpha/gates.toml.*{message}"):
        gates.load("phase0", root)


def test_an_unknown_table_is_rejected(root: Path) -> None:
    fake_course.write(root / "phase1_beta/gates.toml", "[[gates]]\nid = '1'\n")
    with pytest.raises(CourseError, match="unknown table gates"):
        gates.load("phase1", root)


@pytest.mark.parametrize(
    ("threshold", "value", "holds"),
    [
        (">= 10", 10.0, True),
        (">= 10", 9.99, False),
        ("<= 1e-4", 1e-4, True),
        ("<= 1e-4", 2e-4, False),
        ("== 0", 0.0, True),
        ("== 0", 1.0, False),
        ("< 1", 1.0, False),
        ("> 1", 1.5, True),
        ("<= 1", math.nan, False),
        (">= 1", math.nan, False),
        ("== 0", math.nan, False),
    ],
)
def test_thresholds(root: Path, threshold: str, value: float, holds: bool) -> None:
    fake_course.edit(root / "phase0_alpha/gates.toml", 'threshold = "== 10"', f'threshold = "{threshold}"')
    gate = next(gate for gate in gates.load("phase0", root) if gate.id == "0.2")
    assert gate.holds(value) is holds


def test_the_solution_passes_and_the_framework_fails_by_its_value(root: Path) -> None:
    solution, framework = graded(root, "solution"), graded(root, "framework")
    assert {name: outcome.status for name, outcome in solution.items() if name != "0.4"} == dict.fromkeys(
        ("0.1", "0.1-tests", "0.2", "0.3"), "passed"
    )
    assert [framework[name].status for name in ("0.1", "0.1-tests", "0.2", "0.3")] == ["passed"] * 2 + ["failed"] * 2
    assert (framework["0.2"].value, framework["0.2"].crashed) == (55, False)
    assert solution["0.3"].spread == 0.01


def test_a_gate_whose_need_is_absent_is_never_passed_nor_run(root: Path) -> None:
    outcome = graded(root, "solution", "0.4")["0.4"]
    assert (outcome.status, outcome.value) == ("not measured", None)
    assert "no_such_package, it is not installed" in outcome.detail
    assert exit_status([outcome]) == grading.NOTHING_MEASURED


def test_exit_status_tells_failed_from_passed(root: Path) -> None:
    assert exit_status(graded(root, "solution").values()) == 0
    assert exit_status(graded(root, "framework").values()) == 1


@pytest.mark.parametrize(
    ("need", "met"), [("cpu", True), ("pytest", True), ("cuda:999", False), ("no_such_package", False)]
)
def test_needs(need: str, met: bool) -> None:
    assert (needs.absent(need) is None) is met


def test_a_crash_is_a_failed_gate_with_one_line_naming_the_learners_line(root: Path) -> None:
    mine(root, "def prefix_sums(numbers, add):\n    add(1, 1)\n    return numbers[99]\n")
    outcome = graded(root, "mine", "0.2")["0.2"]
    assert (outcome.status, outcome.crashed) == ("failed", True)
    assert outcome.detail == "workspace/phase0_alpha/sums.py:3: IndexError: list index out of range"


@pytest.mark.parametrize("body", ["raise SystemExit(0)", "import sys; sys.exit()"])
def test_leaving_the_program_is_a_crash_and_not_a_pass(root: Path, body: str) -> None:
    mine(root, f"def prefix_sums(numbers, add):\n    {body}\n")
    assert graded(root, "mine", "0.1")["0.1"].crashed


def test_a_syntax_error_is_one_line_too(root: Path) -> None:
    mine(root, "def prefix_sums(numbers, add)\n    return []\n")
    assert graded(root, "mine", "0.2")["0.2"].detail.startswith("workspace/phase0_alpha/sums.py:1: SyntaxError")


def test_fast_and_wrong_waits_instead_of_passing(root: Path) -> None:
    mine(root, "def prefix_sums(numbers, add):\n    return [add(0, number) for number in numbers]\n")
    outcomes = graded(root, "mine", "0.1", "0.2", "0.3")
    assert [outcome.status for outcome in outcomes.values()] == ["failed", "waiting", "waiting"]
    assert outcomes["0.1"].value == 9
    assert exit_status(outcomes.values()) == 1


@pytest.mark.parametrize("answer", ["None", "True", "'0'"])
def test_a_measure_that_returns_no_number_fails(root: Path, answer: str) -> None:
    fake_course.edit(root / "phase1_beta/checks.py", "return 0", f"return {answer}")
    outcome = next(grade(gates.load("phase1", root), "phase1_beta", Use(), root))
    assert outcome.status == "failed"
    assert "must return a number" in outcome.detail


def test_failing_pytest_nodes_are_counted_and_named(root: Path) -> None:
    mine(root, "def prefix_sums(numbers, add):\n    return []\n")
    outcome = graded(root, "mine", "0.1-tests")["0.1-tests"]
    assert (outcome.status, outcome.value, outcome.crashed) == ("failed", 1.0, False)
    assert "test_negative_numbers: " in outcome.detail


def test_tests_that_are_all_skipped_pass_nothing(root: Path) -> None:
    tests = root / "phase0_alpha/tests/test_sums.py"
    fake_course.edit(tests, "import pytest\n", "import pytest\npytestmark = pytest.mark.skip('no such card')\n")
    outcome = graded(root, "solution", "0.1-tests")["0.1-tests"]
    assert outcome.status == "not measured"
    assert "no such card" in outcome.detail


def test_tests_where_there_is_no_pytest_are_not_the_learners_fault(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_installed", lambda package: package != "pytest")
    outcomes = graded(root, "solution", "0.1", "0.1-tests")
    assert outcomes["0.1"].status == "passed"
    assert outcomes["0.1-tests"] == Outcome(
        outcomes["0.1-tests"].gate, "not measured", detail="needs pytest, which make setup installs"
    )


def test_a_measure_may_find_that_it_can_not_be_taken_here(root: Path) -> None:
    raises = "from module0_profiling.course.errors import CannotMeasure; raise CannotMeasure('no such unit')"
    fake_course.edit(root / "phase1_beta/checks.py", "return 0", raises)
    outcome = next(grade(gates.load("phase1", root), "phase1_beta", Use(), root))
    assert (outcome.status, outcome.value, outcome.detail) == ("not measured", None, "no such unit")
    assert exit_status([outcome]) == grading.NOTHING_MEASURED


def test_a_missing_pytest_node_passes_nothing(root: Path) -> None:
    fake_course.edit(root / "phase0_alpha/gates.toml", "tests/test_sums.py", "tests/test_other.py")
    outcome = graded(root, "solution", "0.1-tests")["0.1-tests"]
    assert (outcome.status, outcome.crashed) == ("failed", True)


def test_figures_are_recorded_by_need_and_shown_where_a_need_is_absent(root: Path) -> None:
    gate = next(gate for gate in gates.load("phase0", root) if gate.id == "0.4")
    assert last_recorded(gate, "phase0_alpha", root) == "never recorded"
    paths = grading.record([Outcome(gate, "passed", 12.5, spread=0.02)], "phase0_alpha", "titan check phase0", root)
    assert [path.name for path in paths] == ["gates-cpu-no_such_package.json"]
    data = json.loads(paths[0].read_text(encoding="utf-8"))
    line = last_recorded(gate, "phase0_alpha", root)
    assert line.startswith("last recorded 12.5 x on ")
    assert data["versions"]["python"] in line and data["date"] in line and data["commit"][:12] in line
