"""The GPU suite: order, budget, resuming, failed checks; and a dry run of every entry of every room."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from module0_profiling import bench_gpu, rooms
from module0_profiling.bench_gpu import Entry, GpuCase, dry_run, dry_run_all, entries, run_suite
from module0_profiling.course.needs import absent
from module0_profiling.results import results_folder


class Clock:
    """Time that passes only when an entry runs."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def suite(*cases: tuple[str, GpuCase]) -> list[Entry]:
    return [Entry("phase9_room", kind, case) for kind, case in cases]


def run(found: list[Entry], budget: float = 100, *, status: dict[str, int] | None = None, seconds: float = 10, **more):
    """(labels that ran, lines, labels that failed) of a suite whose entries take so many seconds."""
    clock, ran, lines = Clock(), [], []

    def start(entry: Entry, left: float) -> int:
        assert left <= budget
        clock.now += seconds
        ran.append(entry.case.name)
        return (status or {}).get(entry.case.name, 0)

    failed = run_suite(found, budget, run=start, clock=clock, write=lines.append, **more)
    return ran, lines, failed


FULL = suite(
    ("check", GpuCase("check_a", value=2, seconds=5)),
    ("check", GpuCase("check_b", value=1, seconds=5)),
    ("bench", GpuCase("fast", value=9, seconds=5, check="check_a")),
    ("bench", GpuCase("slow", value=1, seconds=50, check="check_b")),
)


def test_each_entry_has_one_line_with_elapsed_and_budget():
    ran, lines, failed = run(FULL)
    assert ran == ["check_a", "check_b", "fast", "slow"] and failed == []
    assert lines[2] == "[  20/100 s] 3/4 bench phase9_room fast: ok in 10 s"
    assert len(lines) == 4


def test_a_failed_check_is_named_and_what_it_guards_is_not_timed():
    ran, lines, failed = run(FULL, status={"check_a": 1})
    assert failed == ["phase9_room check_a"]
    assert ran == ["check_a", "check_b", "slow"]
    assert lines[0].endswith("check phase9_room check_a: FAILED (status 1) in 10 s")
    assert lines[2].endswith("fast: not run, check_a failed")


def test_an_entry_that_does_not_fit_is_left_and_a_shorter_one_still_runs():
    found = [*FULL[:2], FULL[3], FULL[2]]
    ran, lines, failed = run(found, budget=60)
    assert ran == ["check_a", "check_b", "fast"] and failed == []
    assert lines[2].endswith("slow: no time left, it needs about 50 s")


def test_done_entries_are_skipped_and_kept_after_each_new_one():
    kept: list[list[str]] = []
    ran, lines, _ = run(FULL, done=["phase9_room check_a"], keep=lambda done: kept.append(list(done)))
    assert ran == ["check_b", "fast", "slow"]
    assert lines[0].endswith("check_a: done before")
    assert kept[0] == ["phase9_room check_a", "phase9_room check_b"] and len(kept) == 3


def test_progress_counts_for_one_state_of_the_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_gpu, "DONE", tmp_path / "done.json")
    assert bench_gpu._read_done("abc") == []
    bench_gpu.DONE.write_text(json.dumps({"state": "abc", "done": ["x"]}))
    assert (bench_gpu._read_done("abc"), bench_gpu._read_done("abd")) == (["x"], [])
    bench_gpu.DONE.write_text("{")
    assert bench_gpu._read_done("abc") == []


def test_changed_code_without_a_commit_is_another_state(tmp_path: Path):
    room = tmp_path / "phase9_room"
    room.mkdir()
    (room / "kernel.py").write_text("x = 1\n")
    before = bench_gpu.state_of(tmp_path)
    assert before.startswith("unknown ") and before == bench_gpu.state_of(tmp_path)
    (room / "kernel.py").write_text("x = 2\n")
    assert bench_gpu.state_of(tmp_path) != before


def test_checks_come_first_then_the_most_valuable(monkeypatch: pytest.MonkeyPatch):
    found, problems = entries()
    assert problems == []
    kinds = [entry.kind for entry in found]
    assert kinds == sorted(kinds, key=lambda kind: kind != "check") and kinds.count("check") >= 2
    for kind in ("check", "bench"):
        values = [entry.case.value for entry in found if entry.kind == kind]
        assert values == sorted(values, reverse=True)
    labels = {entry.label for entry in found if entry.kind == "check"}
    assert all(f"{entry.room} {entry.case.check}" in labels for entry in found if entry.case.check)


def test_a_room_that_lacks_a_package_is_one_line_and_costs_no_other(monkeypatch: pytest.MonkeyPatch):
    room = ModuleType("phase8_room.benchmark")
    room.GPU_CASES = (GpuCase("x", 1, 1),)  # type: ignore[attr-defined]

    def load(name: str) -> ModuleType:
        if name.startswith("phase9"):
            raise ModuleNotFoundError("No module named 'rich'", name="rich")
        return room

    monkeypatch.setattr(bench_gpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(bench_gpu.importlib, "import_module", load)
    found, problems = entries(["phase9_room", "phase8_room"])
    assert problems == ["phase9_room: No module named 'rich'; pip install rich"]
    assert [entry.label for entry in found] == ["phase8_room x"]


def test_a_dry_run_tries_every_subject_and_says_which_failed(capsys: pytest.CaptureFixture[str]):
    def broken() -> None:
        raise ValueError("a wrong shape\nand more")

    assert dry_run({"one": lambda: None, "two": broken, "three": lambda: None}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dry run ok: one (") and lines[2].startswith("dry run ok: three (")
    assert lines[1] == "dry run failed: two: ValueError: a wrong shape"


def test_without_a_gpu_the_suite_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench_gpu, "_cuda", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    with pytest.raises(SystemExit) as caught:
        bench_gpu.main()
    assert caught.value.code == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_the_suite_needs_nothing_but_the_standard_library():
    heavy = "{'torch', 'rich', 'typer', 'psutil', 'numpy'}"
    code = f"import sys, module0_profiling.bench_gpu; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=rooms.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(absent("compiler,transformers") is not None, reason=str(absent("compiler,transformers")))
def test_every_entry_of_every_room_starts_and_finishes_on_the_cpu():
    before = {path: path.stat().st_mtime_ns for path in results_folder().rglob("*.json")}
    found, _ = entries()
    lines: list[str] = []
    assert dry_run_all(found, timeout=240, write=lines.append) == 0, lines
    assert lines[-1] == f"dry run: {len(found)} entries started and finished, nothing was recorded"
    assert {path: path.stat().st_mtime_ns for path in results_folder().rglob("*.json")} == before
