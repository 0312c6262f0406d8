"""What only the allocator in Rust has: arrays, memory that is not Python's, and a compiler that may be missing."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from phase0_prototype.errors import UserError
from phase1_memory import rust_allocator
from phase1_memory.allocator import BuddyAllocator, make_allocator
from phase1_memory.allocator_checks import Scenario
from phase1_memory.runs import Run, Want
from phase1_memory.rust_allocator import SUFFIX, RustBuddyAllocator, library, rows, why_not_rust

needs_rust = pytest.mark.skipif(why_not_rust() is not None, reason=str(why_not_rust()))
NOTHING = np.empty((0, 2), np.int64)


@needs_rust
def test_two_thousand_steps_of_a_server_get_the_same_blocks_as_in_python():
    python = Scenario(BuddyAllocator(5000, 8), requests=120).run(2000)
    rust = Scenario(RustBuddyAllocator(5000, 8), requests=120).run(2000)
    assert [request.blocks for request in rust.live] == [request.blocks for request in python.live]
    assert rust.asked == python.asked
    assert rust.allocator.num_free == python.allocator.num_free


@needs_rust
def test_arrays_say_what_lists_say():
    arrays, lists = RustBuddyAllocator(100, 8), RustBuddyAllocator(100, 8)
    wanted = [Want(30), Want(80), Want(0), Want(5, 3)]
    served, runs = arrays.step_arrays(NOTHING, rows(wanted))
    assert lists.step([], wanted) == [
        None if number < 0 else [Run(*run) for run in runs[at : at + number].tolist()] for at, number in served.tolist()
    ]
    assert served[:, 1].tolist() == [1, -1, 0, 1]


@needs_rust
@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2], np.int32, list])
def test_a_question_may_lie_in_memory_in_any_way(layout):
    allocator = RustBuddyAllocator(64)
    _, runs = allocator.step_arrays(NOTHING, layout(np.array([[4, -1], [2, -1]])))
    assert runs.tolist() == [[0, 4], [4, 2]]


@needs_rust
def test_answers_outlive_later_steps_and_the_allocator():
    allocator = RustBuddyAllocator(1000)
    served, runs = allocator.step_arrays(NOTHING, rows([Want(3)] * 50))
    before = served.copy(), runs.copy()
    for _ in range(20):
        allocator.step_arrays(NOTHING, rows([Want(7)] * 5))
    del allocator
    gc.collect()
    others = [RustBuddyAllocator(1000) for _ in range(20)]  # they may get the memory that was given back
    assert (served == before[0]).all() and (runs == before[1]).all() and len(others) == 20


@needs_rust
def test_questions_and_answers_may_be_longer_than_any_before():
    allocator = RustBuddyAllocator(40_000)
    allocator.step([], [Want(40_000)])
    holes = [Run(block, 1) for block in range(0, 40_000, 2)]
    (found,) = allocator.step(holes, [Want(20_000)])
    assert sorted(found) == holes
    assert allocator.step(holes, [Want(1)] * 20_000) is not None and allocator.num_free == 0


@needs_rust
def test_a_mistake_in_a_question_that_made_the_buffers_grow_is_named():
    allocator = RustBuddyAllocator(5000)
    allocator.step([], [Want(5000)])
    with pytest.raises(ValueError, match=r"released Run\(start=4999, length=2\): not within the 5000 blocks"):
        allocator.step([Run(block, 1) for block in range(4999)] + [Run(4999, 2)], [Want(1)] * 2000)
    assert allocator.num_free == 0


@needs_rust
@pytest.mark.parametrize(("num_blocks", "headroom"), [(1 << 31, 1), (1 << 40, 1), (8, 1 << 31), (8, 1 << 40)])
def test_more_than_31_bits_are_refused(num_blocks, headroom):
    with pytest.raises(ValueError, match="both must be 1 to 2147483647"):
        RustBuddyAllocator(num_blocks, headroom)


@needs_rust
def test_headroom_beyond_the_memory_means_the_largest_run():
    allocator = RustBuddyAllocator(6, (1 << 31) - 1)
    assert allocator.step([], [Want(2), Want(2)]) == [[Run(0, 2)], [Run(2, 2)]]


@needs_rust
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_cannot_be_duplicated(duplicate):
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        duplicate(RustBuddyAllocator(8))


def test_the_factory_makes_what_is_asked_for():
    assert isinstance(make_allocator(8, kind="python"), BuddyAllocator)
    assert make_allocator(8).num_blocks == 8
    if why_not_rust() is None:
        assert isinstance(make_allocator(8, kind="rust"), RustBuddyAllocator)
        assert isinstance(make_allocator(8, kind="auto"), RustBuddyAllocator)


def test_without_rust_auto_is_python_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rust_allocator, "BUILD", tmp_path / "build")
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert all(isinstance(make_allocator(8), BuddyAllocator) for _ in range(2))
    (record,) = caplog.records
    assert "runs in Python" in record.getMessage() and "rustup.rs" in record.getMessage()
    with pytest.raises(UserError, match=r"not here: no Rust compiler is on PATH: .*, or choose 'auto'") as refused:
        make_allocator(8, kind="rust")
    assert "\n" not in str(refused.value)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="the compilers here are shell scripts")
@pytest.mark.parametrize("name", ["cargo", "rustc"])
def test_a_compiler_that_fails_is_one_line_with_its_message(name, tmp_path, monkeypatch):
    program(tmp_path / "bin", name, 'echo "warning: old" >&2; echo "error: linker \\`cc\\` not found" >&2; exit 1')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    why = why_not_rust(tmp_path / "build")
    assert why == f"{name} cannot build the Rust allocator: error: linker `cc` not found"
    assert list((tmp_path / "build").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="the compilers here are shell scripts")
def test_a_compiler_that_makes_nothing_is_one_line_too(tmp_path, monkeypatch):
    program(tmp_path / "bin", "cargo", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "made no library" in str(why_not_rust(tmp_path / "build"))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    program(tmp_path / "bin", "cargo", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    why = why_not_rust(tmp_path / "file" / "build")
    assert why is not None and why.startswith("cannot build the Rust allocator in ") and "\n" not in why


def test_a_library_that_does_not_load_is_one_line(tmp_path):
    file = rust_allocator.file_of(tmp_path)
    file.write_text("no library")
    why = why_not_rust(tmp_path)
    assert why is not None and f"delete {file}" in why and "\n" not in why


@needs_rust
def test_many_may_build_at_once_and_a_changed_source_has_another_name(tmp_path, monkeypatch):
    if not (shutil.which("cargo") or shutil.which("rustc")):
        pytest.skip("no Rust compiler is on PATH")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(library, [tmp_path] * 2))
    (first,) = tmp_path.iterdir()
    assert first.suffix == SUFFIX
    source = tmp_path / "rust"
    shutil.copytree(rust_allocator.SOURCE, source)
    (source / "buddy.rs").write_text((source / "buddy.rs").read_text() + "// changed\n")
    monkeypatch.setattr(rust_allocator, "SOURCE", source)
    assert rust_allocator.file_of(tmp_path) != first


@needs_rust
def test_rustc_alone_will_do(tmp_path, monkeypatch):
    if not (rustc := shutil.which("rustc")) or sys.platform == "win32":
        pytest.skip("no rustc is on PATH")
    program(tmp_path / "bin", "rustc", f'exec "{rustc}" "$@"')
    path = os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"])
    if shutil.which("cargo", path=path):
        pytest.skip("cargo lies beside the linker")
    monkeypatch.setenv("PATH", path)
    allocator = RustBuddyAllocator(8, build=tmp_path / "build")
    assert allocator.step([], [Want(3)]) == [[Run(0, 3)]]
