"""The allocator of allocator.py in Rust (rust/buddy.rs): built by cargo or rustc at its first use, called by ctypes.

A call must cost little, for what it does takes 5 us. So questions and answers are rows of two int64 in two arrays that
live as long as the allocator and whose addresses are taken once: numpy needs 1 us to tell an address, as long as ten
requests take to be served.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from module0_profiling import built, rooms
from phase0_prototype.errors import UserError
from phase1_memory.runs import Run, Want, refusal

SOURCE = Path(__file__).parent / "rust"
FILES = ("Cargo.toml", "buddy.rs")
BUILD = rooms.ROOT / "build" / "rust"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
RUSTC = (
    "--edition=2021",
    "--crate-type=cdylib",
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Cpanic=abort",
    "-Cstrip=symbols",
)
TOO_SMALL = -(1 << 63)

Rows = NDArray[np.int64]
_new_run = functools.partial(tuple.__new__, Run)  # Run._make without its Python frame: half of what a run costs


class RustMissing(UserError):
    """No Rust library and no way to build one: one line. The Python allocator does without."""


def why_not_rust(build: Path | None = None) -> str | None:
    """Why the Rust allocator can't run here, in one line; None when it can. The first call builds it: 1 s."""
    try:
        library(build or BUILD)
    except RustMissing as missing:
        return str(missing)
    return None


class RustBuddyAllocator:
    """See `allocator.BuddyAllocator`: the same answers.

    Args:
        num_blocks: 1 .. 2^31 - 1.
        headroom: see allocator.py.
        build: where the library is, or is built; by default build/rust of the repository.

    Raises:
        RustMissing: there is no library, and none can be built.
    """

    def __init__(self, num_blocks: int, headroom: int = 1, *, build: Path | None = None) -> None:
        if not (1 <= num_blocks < 1 << 31 and 1 <= headroom < 1 << 31):
            raise ValueError(f"num_blocks={num_blocks}, headroom={headroom}: both must be 1 to {(1 << 31) - 1}")
        self.num_blocks, self.headroom = num_blocks, headroom
        self._library = library(build or BUILD)
        self._buddy = ctypes.c_void_p(self._library.buddy_new(num_blocks, headroom))
        self._question = np.zeros((0, 2), np.int64)
        self._make_room(questions=1024, answers=4096)

    def __del__(self) -> None:
        if hasattr(self, "_buddy"):
            self._library.buddy_drop(self._buddy)

    def __reduce__(self) -> str:
        raise TypeError("an allocator in Rust can't be copied or pickled: two would free the same memory")

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return int(self._library.buddy_num_free(self._buddy))

    def largest_free_run(self) -> int:
        """Blocks of the longest buddy that is free; 0 when none is."""
        return int(self._library.buddy_largest(self._buddy))

    def step_arrays(self, release: Rows, wanted: Rows) -> tuple[Rows, Rows]:
        """`step` on arrays.

        Args:
            release: [n, 2] int64, start and length of runs.
            wanted: [m, 2] int64, count and after of wants.

        Returns:
            served: [m, 2] int64, for each want the index of its first run and how many runs it has; -1: not enough is
                free for it.
            runs: [r, 2] int64, start and length. Both are the caller's: no later step changes them.
        """
        number, wants = len(release), len(wanted)
        if number + wants > len(self._question):
            self._make_room(questions=2 * (number + wants), answers=len(self._answer))
        self._question[:number] = release
        self._question[number : number + wants] = wanted
        found = self._step(number, wants)
        if found == TOO_SMALL:
            blocks = min(self.num_blocks, sum(self._question[number : number + wants, 0].tolist()))
            self._make_room(questions=len(self._question), answers=2 * (wants + blocks))
            found = self._step(number, wants)
        if found < 0:
            first, second = self._question[-1 - found].tolist()
            bad = Run(first, second) if -1 - found < number else Want(first, second)
            raise ValueError(refusal(bad, self.num_blocks))
        answer = self._answer[: wants + found].copy()
        return answer[:wants], answer[wants:]

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """See `runs.Allocator`."""
        served, found = self.step_arrays(rows(release), rows(wanted))
        flat = found.ravel().tolist()
        runs = list(map(_new_run, zip(flat[::2], flat[1::2], strict=True)))
        return [None if number < 0 else runs[at : at + number] for at, number in served.tolist()]

    def _make_room(self, *, questions: int, answers: int) -> None:
        kept = self._question
        self._question, self._answer = (np.zeros((size, 2), np.int64) for size in (questions, answers))
        self._question[: len(kept)] = kept
        self._step = functools.partial(
            self._library.buddy_step,
            self._buddy,
            ctypes.c_void_p(self._question.ctypes.data),
            ctypes.c_void_p(self._answer.ctypes.data),
            ctypes.c_size_t(answers),
        )


def rows(pairs: Sequence[Run] | Sequence[Want]) -> Rows:
    """Runs or wants as `step_arrays` takes them: [n, 2] int64."""
    # numpy reads a list of tuples four times slower than a flat one
    return np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(pairs)).reshape(-1, 2)


@functools.cache
def library(build: Path) -> ctypes.PyDLL:
    """The library of this source for this machine: loaded, and built before if it is not in `build`.

    PyDLL keeps Python's lock during a call, so that two threads cannot be inside one allocator.

    Raises:
        RustMissing: one line.
    """
    file = file_of(build)
    if not file.exists():
        _build(file)
    try:
        found = ctypes.PyDLL(str(file))
    except OSError as error:
        raise RustMissing(f"the Rust allocator does not load ({error}): delete {file}") from None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("buddy_new", pointer, [ctypes.c_uint64, ctypes.c_uint64]),
        ("buddy_drop", None, [pointer]),
        ("buddy_num_free", ctypes.c_uint32, [pointer]),
        ("buddy_largest", ctypes.c_uint32, [pointer]),
        ("buddy_step", ctypes.c_int64, [pointer, pointer, pointer, size, size, size]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def file_of(build: Path) -> Path:
    """Where the library of this source for this machine is, or will be: whoever changes the source changes the name."""
    text = [(SOURCE / name).read_bytes() for name in FILES]
    digest = hashlib.sha256(b"\0".join([*text, *map(str.encode, RUSTC)])).hexdigest()[:16]
    return build / f"libbuddy-{platform.machine()}-{digest}{SUFFIX}"


def _build(file: Path) -> None:
    """Raises RustMissing with the compiler's first error."""
    cargo, rustc = shutil.which("cargo"), shutil.which("rustc")
    if cargo is None and rustc is None:
        raise RustMissing("no Rust compiler is on PATH: get one at https://rustup.rs")

    def make(folder: Path) -> Path:
        for source in FILES:
            shutil.copy(SOURCE / source, folder)
        target = folder / "target"
        command = [str(rustc), *RUSTC, "--out-dir", str(target), "buddy.rs"]
        if cargo is not None:
            command = [cargo, "build", "--release", "--offline", "--quiet", "--target-dir", str(target)]
        built.run([command], folder, "the Rust allocator")
        made = [path for path in target.rglob(f"*buddy{SUFFIX}") if "deps" not in path.parts]
        if not made:
            raise built.BuildError("the Rust compiler says that all is well, and made no library")
        return made[0]

    try:
        built.build(file, make)
    except built.BuildError as error:
        raise RustMissing(str(error)) from None
    except OSError as error:
        raise RustMissing(f"cannot build the Rust allocator in {file.parent}: {error.strerror or error}") from None
