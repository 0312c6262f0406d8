from __future__ import annotations

import operator
import os
from pathlib import Path

import pytest

from module0_profiling import rooms
from module0_profiling.course import parts, workspace
from module0_profiling.course.errors import CourseError, LearnerCodeError
from module0_profiling.course.parts import Use
from module0_profiling.tests import fake_course


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_course.build(tmp_path, monkeypatch)


def sums(use: Use, root: Path) -> list[int]:
    return parts.resolve("phase0_alpha", "sums", use, root).prefix_sums([1, 2, 3], operator.add)


def test_rooms_are_found_by_looking_and_ordered_by_number(root: Path) -> None:
    for name in ("phase10_ten/a.py", "module0_tools/a.py", "phase2_empty/readme.md", "other/a.py"):
        fake_course.write(root / name, "")
    assert rooms.discover(root) == ("module0_tools", "phase0_alpha", "phase1_beta", "phase10_ten")


@pytest.mark.parametrize("name", ["phase1", "1", "phase1_beta"])
def test_a_room_is_named_by_its_phase_its_number_or_itself(root: Path, name: str) -> None:
    assert rooms.room(name, root) == "phase1_beta"


def test_an_unknown_phase_is_answered_with_the_list(root: Path) -> None:
    with pytest.raises(rooms.UnknownPhaseError, match=r"'phase9'.*phase0, phase1"):
        rooms.room("phase9", root)


def test_this_repository_has_module0_first() -> None:
    assert rooms.ROOMS[0] == "module0_profiling"


def test_use_prints_what_it_was_parsed_from_in_the_order_of_the_phases(root: Path) -> None:
    assert str(Use.parse("phase1=framework, phase0=mine", root)) == "phase0=mine,phase1=framework"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("phase7=mine", "'phase7'"),
        ("phase0=yours", "'yours'.*mine, framework, solution"),
        ("phase0", "'phase0'"),
        ("phase0=mine,0=mine", "twice"),
    ],
)
def test_a_bad_choice_is_rejected_by_name(root: Path, text: str, names: str) -> None:
    with pytest.raises(CourseError, match=names):
        Use.parse(text, root)


@pytest.mark.parametrize(
    ("impl", "default", "expected"),
    [
        ("mine", None, "phase0=mine"),
        ("phase0=framework,phase1=mine", None, "phase0=framework,phase1=mine"),
        ("phase1=mine", "solution", "phase0=solution,phase1=mine"),
        ("", "solution", "phase0=solution"),
        ("", None, ""),
    ],
)
def test_impl_speaks_about_the_phase_at_hand_unless_it_names_phases(
    root: Path, impl: str, default: str | None, expected: str
) -> None:
    assert str(Use.from_env("phase0", default=default, env={"IMPL": impl}, root=root)) == expected


def test_the_default_is_mine_once_started_and_the_solution_before(root: Path) -> None:
    assert str(Use().complete(root)) == "phase0=solution,phase1=solution"
    workspace.start("phase0", root=root)
    assert str(Use().complete(root)) == "phase0=mine,phase1=solution"


def test_parts_are_the_files_of_the_framework(root: Path) -> None:
    assert parts.available("phase0_alpha", root) == ["sums"]
    assert parts.available("phase1_beta", root) == ["double", "kernels.twice", "tables"]


def test_each_implementation_comes_from_its_home(root: Path) -> None:
    workspace.start("phase0", root=root)
    homes = {"solution": "phase0_alpha", "framework": "phase0_alpha/framework", "mine": "workspace/phase0_alpha"}
    for implementation, home in homes.items():
        module = parts.resolve("phase0_alpha", "sums", Use.parse(f"phase0={implementation}", root), root)
        assert module.__file__ == str(root / home / "sums.py")
        assert module.prefix_sums([1, 2], operator.add) == [1, 3]


def test_what_is_not_a_part_cannot_be_resolved(root: Path) -> None:
    with pytest.raises(CourseError, match="no part 'checks': its parts are sums"):
        parts.resolve("phase0_alpha", "checks", Use(), root)


def test_mine_before_the_start_is_an_error_and_not_the_framework(root: Path) -> None:
    with pytest.raises(CourseError, match="never started: make start-phase0"):
        sums(Use.parse("phase0=mine", root), root)


def test_an_edit_is_seen_even_when_second_and_size_stay(root: Path) -> None:
    workspace.start("phase0", root=root)
    use, mine = Use.parse("phase0=mine", root), root / "workspace/phase0_alpha/sums.py"
    assert sums(use, root) == [1, 3, 6]
    facts = mine.stat()
    fake_course.edit(mine, "total = 0", "total = 7")
    os.utime(mine, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert sums(use, root) == [8, 10, 13]


def test_an_unchanged_file_is_loaded_once(root: Path) -> None:
    workspace.start("phase0", root=root)
    use = Use.parse("phase0=mine", root)
    assert parts.resolve("phase0_alpha", "sums", use, root) is parts.resolve("phase0_alpha", "sums", use, root)


def test_siblings_are_the_learners_own_and_follow_their_edits(root: Path) -> None:
    workspace.start("phase1", root=root)
    use = Use.parse("phase1=mine", root)
    assert parts.resolve("phase1_beta", "double", use, root).double(4) == 8
    fake_course.edit(root / "workspace/phase1_beta/tables.py", "number + number", "100 + number")
    assert parts.resolve("phase1_beta", "double", use, root).double(4) == 104


def test_a_part_that_the_learner_lacks_is_the_frameworks_and_the_description_says_so(root: Path) -> None:
    workspace.start("phase1", root=root)
    (root / "workspace/phase1_beta/tables.py").unlink()
    use = Use.parse("phase1=mine", root)
    table = parts.resolve("phase1_beta", "tables", use, root)
    assert table.__file__ == str(root / "phase1_beta/framework/tables.py")
    assert parts.resolve("phase1_beta", "double", use, root).table is table.table
    expected = "phase0: solution, phase1: mine (workspace/phase1_beta; from the framework: tables.py)"
    assert parts.describe(use, root) == expected


def test_cuda_files_are_found_by_path(root: Path) -> None:
    use = Use.parse("phase1=solution", root)
    assert parts.path("phase1_beta", "kernels.twice", use, ".cu", root) == root / "phase1_beta/kernels/twice.cu"
    with pytest.raises(CourseError, match="not a Python module"):
        parts.resolve("phase1_beta", "kernels.twice", use, root)
    with pytest.raises(CourseError, match=r"has no \.py file"):
        parts.path("phase1_beta", "kernels.twice", use, ".py", root)


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("def prefix_sums(:\n    pass\n", r"^workspace/phase0_alpha/sums.py:1: SyntaxError: "),
        ("x = 1\ny = unknown\n", r"^workspace/phase0_alpha/sums.py:2: NameError: name 'unknown' is not defined$"),
    ],
)
def test_a_learners_file_that_does_not_load_is_one_line(root: Path, broken: str, line: str) -> None:
    workspace.start("phase0", root=root)
    (root / "workspace/phase0_alpha/sums.py").write_text(broken, encoding="utf-8")
    with pytest.raises(LearnerCodeError, match=line) as caught:
        sums(Use.parse("phase0=mine", root), root)
    assert "\n" not in str(caught.value)


def test_a_file_loads_again_once_it_is_mended(root: Path) -> None:
    workspace.start("phase0", root=root)
    mine = root / "workspace/phase0_alpha/sums.py"
    good = mine.read_text(encoding="utf-8")
    mine.write_text("(", encoding="utf-8")
    with pytest.raises(LearnerCodeError):
        sums(Use(), root)
    mine.write_text(good, encoding="utf-8")
    assert sums(Use(), root) == [1, 3, 6]
