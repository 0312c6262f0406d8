"""Which physical blocks are free: the interface, and a buddy allocator in Python, the reference for the Rust one.

Blocks are numbered 0 .. num_blocks - 1. Free memory is kept as runs of 2^k blocks that begin at a multiple of 2^k. Two
neighbours of one size whose union begins at a multiple of the double size are buddies: both free, they merge. So a run
is found, split or merged in O(log n) (Knowlton, "A fast storage allocator", CACM 1965).

Three things are added for a cache that grows by a block at a time. A request names the block that it wants to continue
after, and gets what is free there first, so that its blocks stay neighbours. A new request begins in a run with
`headroom` behind it where there is one. And one call serves a whole step of the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Run(NamedTuple):
    """Blocks start .. start + length - 1."""

    start: int
    length: int


class Want(NamedTuple):
    """How many blocks a request needs more, and the last block that it has (-1: it has none)."""

    count: int
    after: int = -1


class OutOfBlocks(Exception):
    """More blocks were wanted than are free."""


class Allocator(Protocol):
    """What the block manager needs."""

    num_blocks: int

    @property
    def num_free(self) -> int:
        """Free blocks."""
        ...

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """Take back `release`, then serve `wanted` in order; each whole or, where not enough is free, not at all (None).

        Raises ValueError when blocks are released that are not in use: nothing is changed then.
        """
        ...

    def largest_free_run(self) -> int:
        """Blocks of the longest run that could be given in one piece."""
        ...


@dataclass(frozen=True)
class _Options:
    headroom: int


class BuddyAllocator:
    """See the module.

    Args:
        num_blocks: any positive number.
        headroom: blocks that a new request would like to have free behind its first.
    """

    def __init__(self, num_blocks: int, headroom: int = 1) -> None:
        if num_blocks < 1 or headroom < 1:
            raise ValueError(f"num_blocks={num_blocks}, headroom={headroom}: both must be at least 1")
        self.num_blocks, self.headroom = num_blocks, headroom
        self._orders = num_blocks.bit_length()
        self._free: list[dict[int, None]] = [{} for _ in range(self._orders)]  # start of each free run, newest last
        self._num_free = 0
        self._put(Run(0, num_blocks))

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return self._num_free

    def largest_free_run(self) -> int:
        """Blocks of the longest buddy that is free; 0 when none is."""
        return next((1 << order for order in reversed(range(self._orders)) if self._free[order]), 0)

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """See `Allocator`."""
        self._check(release)
        for run in release:
            self._put(run)
        return [self._serve(want) if 0 <= want.count <= self._num_free else None for want in wanted]

    def free_runs(self) -> list[Run]:
        """All free buddies by their start."""
        return sorted(Run(start, 1 << order) for order, starts in enumerate(self._free) for start in starts)

    def _serve(self, want: Want) -> list[Run]:
        found: list[Run] = []
        left, after = want.count, want.after
        while left and after >= 0 and (run := self._take_at(after + 1, left)):
            _append(found, run)
            left, after = left - run.length, run.start + run.length - 1
        goal = self.headroom if want.after < 0 else 1
        while left:
            run = self._take_best(left, max(left, goal))
            _append(found, run)
            left -= run.length
            # what follows the piece belongs to the same hole: go on there before looking elsewhere
            while left and (more := self._take_at(run.start + run.length, left)):
                _append(found, more)
                left, run = left - more.length, more
        return found

    def _take_at(self, block: int, most: int) -> Run | None:
        """The largest aligned piece of at most `most` blocks that begins at `block`, if `block` is free."""
        for order in range(self._orders):
            start = block & -(1 << order)
            if start in self._free[order]:
                del self._free[order][start]
                aligned = (block & -block).bit_length() - 1 if block else order
                size = 1 << min(order, aligned, most.bit_length() - 1)
                self._num_free -= 1 << order
                self._put(Run(start, block - start))
                self._put(Run(block + size, start + (1 << order) - block - size))
                return Run(block, size)
        return None

    def _take_best(self, most: int, goal: int) -> Run:
        """The first piece of the smallest free run of at least `goal` blocks; else of the largest that there is."""
        least = min(self._orders - 1, (goal - 1).bit_length())
        order = next((o for o in range(least, self._orders) if self._free[o]), None)
        if order is None:
            order = next(o for o in reversed(range(least)) if self._free[o])
        start = next(reversed(self._free[order]))  # the newest: what was just freed is warm
        run = self._take_at(start, most)
        assert run is not None
        return run

    def _put(self, run: Run) -> None:
        """Free an interval: its aligned pieces, each merged with its buddy as long as that is free too."""
        start, left = run
        self._num_free += left
        while left:
            order = min(left.bit_length() - 1, (start & -start).bit_length() - 1 if start else self._orders - 1)
            size = 1 << order
            self._merge(start, order)
            start, left = start + size, left - size

    def _merge(self, start: int, order: int) -> None:
        while order + 1 < self._orders:
            buddy = start ^ (1 << order)
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            start, order = min(start, buddy), order + 1
        self._free[order][start] = None

    def _check(self, release: Sequence[Run]) -> None:
        taken: list[Run] = sorted(release)
        for run, after in zip(taken, [*taken, Run(self.num_blocks, 0)][1:], strict=True):
            if run.start < 0 or run.length < 1 or run.start + run.length > self.num_blocks:
                raise ValueError(f"released {run}: not within the {self.num_blocks} blocks")
            if run.start + run.length > after.start:
                raise ValueError(f"released {run} and {after}: they overlap")
            if self._any_free(run):
                raise ValueError(f"released {run}: some of it is free already")

    def _any_free(self, run: Run) -> bool:
        block, end = run.start, run.start + run.length
        for order in range(self._orders):
            size = 1 << order
            start = block & -size
            if start in self._free[order]:
                return True
        inside = (
            start
            for order in range(self._orders)
            for start in _multiples(block, end, 1 << order)
            if start in self._free[order]
        )
        return next(inside, None) is not None


def _multiples(begin: int, end: int, size: int) -> range:
    return range(-(-begin // size) * size, end, size)


def _append(found: list[Run], run: Run) -> None:
    """Neighbours become one run."""
    if found and found[-1].start + found[-1].length == run.start:
        run = Run(found[-1].start, found.pop().length + run.length)
    found.append(run)


def make_allocator(num_blocks: int, headroom: int = 64, kind: str = "auto") -> Allocator:
    """An allocator of these blocks; kind: "auto", "python" or "rust"."""
    return BuddyAllocator(num_blocks, headroom)
