from __future__ import annotations

from pathlib import Path

import pytest

from module0_profiling.course import workspace
from module0_profiling.course.errors import CourseError
from module0_profiling.tests import fake_course


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_course.build(tmp_path, monkeypatch)


@pytest.fixture
def mine(root: Path) -> Path:
    workspace.start("phase0", root=root)
    return root / "workspace/phase0_alpha/sums.py"


def test_start_copies_the_framework_and_nothing_else(root: Path) -> None:
    done = workspace.start("phase1", root=root)
    assert done.copied == ("double.py", "kernels/twice.cu", "tables.py")
    for name in done.copied:
        assert (done.folder / name).read_bytes() == (root / "phase1_beta/framework" / name).read_bytes()
    assert sorted(path.name for path in done.folder.rglob("*.*")) == ["double.py", "tables.py", "twice.cu"]


def test_start_again_keeps_what_was_changed(root: Path, mine: Path) -> None:
    mine.write_text("changed", encoding="utf-8")
    assert workspace.start("phase0", root=root).kept == ("sums.py",)
    assert mine.read_text(encoding="utf-8") == "changed"


def test_start_with_force_overwrites_and_keeps_a_backup(root: Path, mine: Path) -> None:
    mine.write_text("changed", encoding="utf-8")
    done = workspace.start("phase0", force=True, root=root)
    assert mine.read_bytes() == (root / "phase0_alpha/framework/sums.py").read_bytes()
    assert done.backup is not None
    assert (done.backup / "sums.py").read_text(encoding="utf-8") == "changed"


def test_start_refreshes_a_file_that_only_the_framework_changed(root: Path, mine: Path) -> None:
    fake_course.edit(root / "phase0_alpha/framework/sums.py", "from the beginning", "from the very beginning")
    assert workspace.status("phase0", root) == {"sums.py": "outdated"}
    assert workspace.start("phase0", root=root).copied == ("sums.py",)
    assert "very" in mine.read_text(encoding="utf-8")


def test_status_tells_changed_from_unchanged_missing_and_added(root: Path) -> None:
    folder = workspace.start("phase1", root=root).folder
    (folder / "double.py").write_text("changed", encoding="utf-8")
    (folder / "tables.py").unlink()
    (folder / "notes.txt").write_text("my own", encoding="utf-8")
    expected = {"double.py": "changed", "kernels/twice.cu": "unchanged", "tables.py": "missing", "notes.txt": "added"}
    assert workspace.status("phase1", root) == expected


@pytest.mark.parametrize("part", ["double", "double.py"])
def test_reset_restores_one_part_and_keeps_the_learners_version(root: Path, part: str) -> None:
    folder = workspace.start("phase1", root=root).folder
    for name in ("double.py", "tables.py"):
        (folder / name).write_text("changed", encoding="utf-8")
    done = workspace.reset("phase1", part, root=root)
    assert done.files == ("double.py",)
    assert done.backup is not None
    assert (done.backup / "double.py").read_text(encoding="utf-8") == "changed"
    assert workspace.status("phase1", root)["double.py"] == "unchanged"
    assert workspace.status("phase1", root)["tables.py"] == "changed"


def test_reset_of_all_restores_changed_and_missing_files_and_leaves_added_ones(root: Path) -> None:
    folder = workspace.start("phase1", root=root).folder
    (folder / "double.py").write_text("changed", encoding="utf-8")
    (folder / "tables.py").unlink()
    (folder / "notes.txt").write_text("my own", encoding="utf-8")
    assert workspace.reset("phase1", root=root).files == ("double.py", "tables.py")
    assert set(workspace.status("phase1", root).values()) == {"unchanged", "added"}


def test_two_resets_keep_two_backups(root: Path, mine: Path) -> None:
    backups = []
    for text in ("first", "second"):
        mine.write_text(text, encoding="utf-8")
        backups.append(workspace.reset("phase0", root=root).backup)
    assert [(backup / "sums.py").read_text(encoding="utf-8") for backup in backups if backup] == ["first", "second"]


def test_reset_of_an_unknown_part_names_the_parts(root: Path, mine: Path) -> None:
    with pytest.raises(CourseError, match="no part 'sum': its parts are sums"):
        workspace.reset("phase0", "sum", root=root)


def test_a_room_without_framework_cannot_be_started(root: Path) -> None:
    fake_course.write(root / "phase2_plain/code.py", "")
    with pytest.raises(CourseError, match="phase2 has no framework"):
        workspace.start("phase2", root=root)


def test_a_lost_record_of_origins_counts_files_as_changed(root: Path, mine: Path) -> None:
    (root / "workspace/.origin.json").write_text("{", encoding="utf-8")
    fake_course.edit(root / "phase0_alpha/framework/sums.py", "from the beginning", "from the very beginning")
    assert workspace.status("phase0", root) == {"sums.py": "changed"}


def test_the_digest_follows_the_learners_files(root: Path, mine: Path) -> None:
    before = workspace.digest("phase0_alpha", root)
    mine.write_text("changed", encoding="utf-8")
    assert workspace.digest("phase0_alpha", root) != before
