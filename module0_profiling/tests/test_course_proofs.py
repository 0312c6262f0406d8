from __future__ import annotations

from pathlib import Path

import pytest

from module0_profiling.course import leaks, marks, planted, prove, signatures
from module0_profiling.course.errors import CourseError
from module0_profiling.tests import fake_course

ROW_OF_BUG = """
[[bug]]
file = "sums.py"
find = {find!r}
replace = {replace!r}
caught_by = {caught_by!r}
why = "none"
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_course.build(tmp_path, monkeypatch)


@pytest.fixture
def framework(root: Path) -> Path:
    return root / "phase0_alpha/framework/sums.py"


def plant(root: Path, find: str, replace: str, caught_by: str) -> None:
    row = ROW_OF_BUG.format(find=find, replace=replace, caught_by=caught_by)
    fake_course.write(root / "phase0_alpha/planted.toml", row)


def test_marks_are_found_with_the_function_that_holds_or_follows_them(root: Path) -> None:
    found = [mark for room in ("phase0_alpha", "phase1_beta") for mark in marks.find(root / room / "framework")]
    assert [(mark.task, str(mark.file), mark.function) for mark in found] == [
        ("0.1", "sums.py", "prefix_sums"),
        ("1.1", "double.py", "double"),
        ("1.1", "kernels/twice.cu", "twice"),
    ]


def test_a_mark_at_the_end_of_a_function_is_in_it(tmp_path: Path) -> None:
    text = "class A:\n    def f(self):\n        x = 1\n        # TASK 0.1\n\n    def g(self): ...\n# TASK 0.2\n"
    fake_course.write(tmp_path / "a.py", text)
    assert [(mark.task, mark.function) for mark in marks.find(tmp_path)] == [("0.1", "A.f"), ("0.2", "")]


def test_a_sound_course_has_no_problem_in_its_text(root: Path) -> None:
    for room in ("phase0_alpha", "phase1_beta"):
        assert signatures.problems(room, root) == []
        assert leaks.problems(room, root) == []
    assert prove.loose_tasks("phase0_alpha", root) == []


# Signatures


@pytest.mark.parametrize(
    ("find", "replace"),
    [
        ("numbers: list[int],", "values: list[int],"),
        ("numbers: list[int],", "numbers: list,"),
        ("Callable[[int, int], int])", "Callable[[int, int], int] = max)"),
        ("-> list[int]:", "-> tuple[int]:"),
        ("def prefix_sums", "def running_sums"),
    ],
)
def test_a_signature_that_drifts_is_reported(root: Path, framework: Path, find: str, replace: str) -> None:
    fake_course.edit(framework, find, replace)
    assert any("phase0 sums.py:" in line for line in signatures.problems("phase0_alpha", root))


def test_a_public_name_of_the_solution_must_be_in_the_framework_or_listed(root: Path) -> None:
    fake_course.edit(root / "phase0_alpha/sums.py", "def _check(", "def check(")
    assert any("check is public in the solution only" in line for line in signatures.problems("phase0_alpha", root))
    rows = root / "phase0_alpha/gates.toml"
    fake_course.write(rows, 'solution_only = ["sums.check"]\n' + rows.read_text(encoding="utf-8"))
    assert signatures.problems("phase0_alpha", root) == []


def test_a_class_that_one_side_has_is_reported_once_and_listed_once(root: Path, framework: Path) -> None:
    added = "\nclass Slow:\n    def one(self): ...\n    def two(self): ...\n"
    framework.write_text(framework.read_text(encoding="utf-8") + added, encoding="utf-8")
    advice = "make it private or list sums.Slow in framework_only"
    expected = [f"phase0 sums.py: Slow is public in the framework only: {advice}"]
    assert signatures.problems("phase0_alpha", root) == expected
    rows = root / "phase0_alpha/gates.toml"
    fake_course.write(rows, 'framework_only = ["sums.Slow"]\n' + rows.read_text(encoding="utf-8"))
    assert signatures.problems("phase0_alpha", root) == []


def test_a_part_without_solution_is_reported(root: Path) -> None:
    fake_course.write(root / "phase0_alpha/framework/other.py", "")
    assert signatures.problems("phase0_alpha", root) == ["phase0 other.py: the framework has it, the solution does not"]


def test_dataclass_fields_methods_and_properties_are_part_of_the_interface() -> None:
    def names(text: str) -> dict[str, str]:
        return signatures.interface(text)

    base = "@dataclass(frozen=True)\nclass A:\n    x: int = 1\n    @property\n    def y(self) -> int: return 1\n"
    assert set(names(base)) == {"A", "A.x", "A.y"}
    for changed in (
        base.replace("x: int", "x: float"),
        base.replace("= 1", "= 2"),
        base.replace("(frozen=True)", "()"),
        base.replace("    @property\n", ""),
        base.replace("class A:", "class A(B):"),
    ):
        assert names(changed) != names(base)
    assert names("@torch.compile\ndef f(): pass") == names("def f(): pass")


def test_a_kernel_with_other_parameters_is_reported(root: Path) -> None:
    fake_course.edit(root / "phase1_beta/framework/kernels/twice.cu", "int n)", "long n)")
    assert any("kernels/twice.cu: twice(" in line for line in signatures.problems("phase1_beta", root))


# Leaks

ANSWER_RENAMED = '''
def prefix_sums(numbers: list[int], add: Callable[[int, int], int]) -> list[int]:
    """Another text."""
    t, out = 0, []  # TASK 0.1
    for n in numbers:
        t = add(t, n)
        out.append(t)
    _check(numbers, out)
    return out
'''
RUN_OF_ANSWER = """
def _helper(a, b):
    print("something else first")
    big = max(len(a), len(b))
    small = min(len(a), len(b))
    delta = big - small
    text = "lengths differ by {}".format(delta)
    if delta > 0:
        raise ValueError(text)
"""


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (RUN_OF_ANSWER, "_helper holds 4 statements in a row of the solution's sums.py: _check"),
        ("# total = add( total,number )\n# sums.append(total)\n", "2 lines of the solution in a comment"),
        ("# see phase0_alpha/sums.py\n", "points at the solution"),
        ("# the solution keeps the total\n", "points at the solution"),
        ("from phase0_alpha import sums\n", "imports the solution phase0_alpha.sums"),
        ("from phase0_alpha.sums import prefix_sums as fast\n", "imports the solution phase0_alpha.sums"),
        ("import phase0_alpha.framework.sums\n", "needs a relative import"),
    ],
)
def test_a_leak_is_reported(root: Path, framework: Path, added: str, message: str) -> None:
    framework.write_text(framework.read_text(encoding="utf-8") + "\n" + added, encoding="utf-8")
    assert any(message in line for line in leaks.problems("phase0_alpha", root))


def test_an_import_for_annotations_is_no_leak(root: Path, framework: Path) -> None:
    added = "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from phase0_alpha.sums import prefix_sums\n"
    framework.write_text(framework.read_text(encoding="utf-8") + added, encoding="utf-8")
    assert leaks.problems("phase0_alpha", root) == []


def test_the_answer_under_other_names_is_reported(root: Path, framework: Path) -> None:
    framework.write_text(ANSWER_RENAMED, encoding="utf-8")
    assert any("prefix_sums holds a TASK, yet it equals" in line for line in leaks.problems("phase0_alpha", root))


def test_statements_before_the_mark_are_given_and_may_be_shared(root: Path, framework: Path) -> None:
    shared = "\n".join(RUN_OF_ANSWER.splitlines()[3:])
    given = f"def prefix_sums(a, b):\n{shared}\n    # TASK 0.1\n    return slow(a, b)\n"
    framework.write_text(given, encoding="utf-8")
    assert not any("in a row" in line for line in leaks.problems("phase0_alpha", root))
    framework.write_text(given.replace("):\n", "):\n    # TASK 0.1\n", 1), encoding="utf-8")
    assert any("in a row" in line for line in leaks.problems("phase0_alpha", root))


def test_an_unsolved_kernel_must_differ_from_the_solution(root: Path) -> None:
    answer = (root / "phase1_beta/kernels/twice.cu").read_text(encoding="utf-8")
    fake_course.write(root / "phase1_beta/framework/kernels/twice.cu", f"// TASK 1.1\n// other comments\n{answer}")
    assert any("kernels/twice.cu: twice holds a TASK" in line for line in leaks.problems("phase1_beta", root))


def test_a_step_of_the_solutions_ladder_must_not_appear_in_a_kernel_of_the_framework(root: Path) -> None:
    head = 'extern "C" __global__ void NAME(const float* in, float* out, int n) {'
    lines = "".join(f"    float x{index} = in[i + {index}];\n" for index in range(8))
    for folder, name in (("", "twice_step3"), ("framework/", "_helper")):
        path = root / f"phase1_beta/{folder}kernels/twice.cu"
        step = f"{head.replace('NAME', name)}\n    int i = {len(name)};\n{lines}}}\n"
        path.write_text(path.read_text(encoding="utf-8") + step, encoding="utf-8")
    told = leaks.problems("phase1_beta", root)
    assert told == ["phase1 framework/kernels/twice.cu: _helper holds 6 lines in a row of the solution"]


def test_kernels_that_only_the_solution_has_are_steps_of_its_ladder(root: Path) -> None:
    path = root / "phase1_beta/kernels/twice.cu"
    step = 'extern "C" __global__ void twice_step2(int n) {\n    n = 1;\n}\n'
    path.write_text(path.read_text(encoding="utf-8") + step, encoding="utf-8")
    assert signatures.problems("phase1_beta", root) == []


# Tasks, hints, gates


@pytest.mark.parametrize(
    ("file", "find", "replace", "message"),
    [
        ("framework/sums.py", "# TASK 0.1", "# 0.1", "task 0.1 has no TASK mark"),
        ("framework/sums.py", "# TASK 0.1", "# TASK 0.1, TASK 0.2", "task 0.2 has no gate"),
        ("hints.toml", 'level = 3\ntext = "hint number 3"', 'level = 3\ntext = " "', "text is empty"),
    ],
)
def test_loose_tasks_are_reported(root: Path, file: str, find: str, replace: str, message: str) -> None:
    fake_course.edit(root / "phase0_alpha" / file, find, replace)
    try:
        told = "\n".join(prove.loose_tasks("phase0_alpha", root))
    except CourseError as error:
        told = str(error)
    assert message in told


def test_a_short_ladder_is_reported(root: Path) -> None:
    assert prove.loose_tasks("phase1_beta", root) == ["phase1: task 1.1 has 1 hints, it needs 3"]


def test_a_need_that_the_project_does_not_know_is_reported(root: Path) -> None:
    fake_course.write(root / "pyproject.toml", 'dependencies = ["torch"]\n')
    assert any("needs no_such_package" in line for line in prove.loose_tasks("phase0_alpha", root))


# Gates keep their promises


def without_tests(root: Path) -> None:
    fake_course.edit(
        root / "phase0_alpha/gates.toml",
        'pytest = "phase0_alpha/tests/test_sums.py"',
        'measure = "phase0_alpha.checks:mismatches"',
    )


def test_framework_and_solution_keep_their_promises_and_what_is_not_measured_is_noted(root: Path) -> None:
    without_tests(root)
    problems, notes = prove.gates_as_promised("phase0_alpha", root, ratios=True)
    assert problems == []
    assert len(notes) == 2 and all("gate 0.4 is not measured here" in note for note in notes)


@pytest.mark.parametrize(
    ("file", "find", "replace", "message"),
    [
        ("framework/sums.py", "total = 0", "total = 1", "framework: gate 0.1 failed"),
        ("framework/sums.py", "total = 0", "total = None", "framework: gate 0.2 crashed: phase0_alpha/framework"),
        ("sums.py", "total = add(total, number)", "total += number", "solution: gate 0.2 failed"),
        (
            "gates.toml",
            '"== 10"',
            '"<= 99"',
            "framework: gate 0.2 passed (55, threshold <= 99), it should have failed",
        ),
    ],
)
def test_a_broken_promise_is_reported(root: Path, file: str, find: str, replace: str, message: str) -> None:
    without_tests(root)
    fake_course.edit(root / "phase0_alpha" / file, find, replace)
    problems, _ = prove.gates_as_promised("phase0_alpha", root)
    assert any(message in line for line in problems), problems


# Planted bugs


def test_the_whole_proof_of_a_sound_phase(root: Path) -> None:
    proof = prove.prove("phase0", root=root)
    assert proof.problems == ()
    assert (proof.caught, proof.planted) == (2, 2)


def test_a_bug_that_its_test_does_not_notice_is_reported(root: Path) -> None:
    plant(
        root,
        "total = add(total, number)",
        "total = add(total, abs(number))",
        "phase0_alpha/tests/test_sums.py::test_empty",
    )
    proof = prove.uncaught("phase0_alpha", root)
    assert (proof.caught, proof.planted) == (0, 1)
    assert "not caught by phase0_alpha/tests/test_sums.py::test_empty" in proof.problems[0]


def test_a_bug_that_breaks_the_import_of_the_tests_counts_as_not_caught(root: Path) -> None:
    node = "phase0_alpha/tests/test_sums.py"
    fake_course.edit(root / node, "import pytest\n", "import pytest\nfrom phase0_alpha import sums\n")
    plant(root, "def _check(", "def _check(:", node)
    assert "breaks the run" in prove.uncaught("phase0_alpha", root).problems[0]


def test_a_test_that_hangs_has_noticed_the_bug(root: Path) -> None:
    plant(root, "return sums", "while True: pass", "phase0_alpha/tests/test_sums.py::test_empty")
    verdict = planted.hunt("phase0", root, timeout=2)[0]
    assert verdict.caught and "hung" in verdict.detail


def test_a_test_that_fails_without_a_bug_proves_nothing(root: Path) -> None:
    fake_course.edit(root / "phase0_alpha/tests/test_sums.py", "== []", "== [0]")
    plant(root, "return sums", "return sums[:]", "phase0_alpha/tests/test_sums.py::test_empty")
    assert "fails with no bug planted: test_empty" in prove.uncaught("phase0_alpha", root).problems[0]


@pytest.mark.parametrize(
    ("find", "message"), [("total", "occurs 4 times"), ("no such text", "occurs 0 times"), ("", "find must be some")]
)
def test_a_bug_must_apply_exactly_once(root: Path, find: str, message: str) -> None:
    plant(root, find, "x", "0.2")
    with pytest.raises(CourseError, match=message):
        planted.load("phase0", root)


def test_a_phase_that_plants_no_bug_proves_nothing(root: Path) -> None:
    assert "plants no bug" in prove.uncaught("phase1_beta", root).problems[0]


def test_the_sources_are_never_touched(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*.py")}
    planted.hunt("phase0", root, only=[2])
    assert {path: path.read_bytes() for path in root.rglob("*.py")} == before
