"""The allocator of allocator.py in Rust (rust/buddy.rs): built by rustc where there is one, called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from phase1_memory.allocator import Run, Want

SOURCE = Path(__file__).parent / "rust" / "buddy.rs"
RUN = np.dtype([("start", np.uint32), ("length", np.uint32)])
WANT = np.dtype([("count", np.uint32), ("after", np.int64)], align=True)


class RustMissing(RuntimeError):
    """There is no Rust compiler, or it failed: one line; the Python allocator works without."""

    is_user_error = True


@cache
def library(build: Path) -> ctypes.CDLL:
    """Compile into `build` when the source is newer than what is there, and load it."""
    rustc = shutil.which("rustc")
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    file = build / f"libbuddy{suffix}"
    if not file.exists() or file.stat().st_mtime < SOURCE.stat().st_mtime:
        if rustc is None:
            raise RustMissing("no rustc: the allocator runs in Python (https://rustup.rs makes it faster)")
        build.mkdir(parents=True, exist_ok=True)
        flags = ["--edition", "2021", "--crate-type", "cdylib", "-C", "opt-level=3", "-C", "panic=abort"]
        done = subprocess.run([rustc, *flags, "-o", str(file), str(SOURCE)], capture_output=True, text=True)
        if done.returncode:
            raise RustMissing(f"rustc cannot build {SOURCE.name}: {done.stderr.strip().splitlines()[0]}")
    found = ctypes.CDLL(str(file))
    pointer, u32, size = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_size_t
    for name, result, arguments in (
        ("buddy_new", pointer, [u32, u32]),
        ("buddy_drop", None, [pointer]),
        ("buddy_num_free", u32, [pointer]),
        ("buddy_largest", u32, [pointer]),
        ("buddy_step", ctypes.c_int64, [pointer, pointer, size, pointer, size, pointer, pointer, pointer]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class RustBuddyAllocator:
    """See `allocator.BuddyAllocator`: the same answers."""

    def __init__(self, num_blocks: int, headroom: int = 1, *, build: Path) -> None:
        if num_blocks < 1 or headroom < 1:
            raise ValueError(f"num_blocks={num_blocks}, headroom={headroom}: both must be at least 1")
        self.num_blocks, self.headroom = num_blocks, headroom
        self._library = library(build)
        self._buddy = self._library.buddy_new(num_blocks, headroom)
        self._runs, self._refused = ctypes.c_void_p(), np.zeros(1, RUN)

    def __del__(self) -> None:
        if getattr(self, "_buddy", None):
            self._library.buddy_drop(self._buddy)

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return int(self._library.buddy_num_free(self._buddy))

    def largest_free_run(self) -> int:
        """Blocks of the longest buddy that is free; 0 when none is."""
        return int(self._library.buddy_largest(self._buddy))

    def step_arrays(self, release: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`step` on arrays: release of RUN, wanted of WANT. Returns runs (RUN), and how many each want got (-1: none)."""
        counts = np.empty(len(wanted), np.int32)
        number = self._library.buddy_step(
            self._buddy,
            release.ctypes.data,
            len(release),
            wanted.ctypes.data,
            len(wanted),
            counts.ctypes.data,
            ctypes.addressof(self._runs),
            self._refused.ctypes.data,
        )
        if number < 0:
            start, length = (int(value) for value in self._refused[0])
            raise ValueError(f"released {Run(start, length)}: not in use, or released twice")
        if number == 0:
            return np.empty(0, RUN), counts
        view = (ctypes.c_char * (number * RUN.itemsize)).from_address(self._runs.value or 0)
        return np.frombuffer(view, RUN).copy(), counts

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """See `allocator.Allocator`."""
        runs, counts = self.step_arrays(np.array(release, RUN), np.array(wanted, WANT))
        pieces, found, at = runs.tolist(), [], 0
        for count in counts.tolist():
            found.append(None if count < 0 else [Run(*piece) for piece in pieces[at : at + count]])
            at += max(count, 0)
        return found
