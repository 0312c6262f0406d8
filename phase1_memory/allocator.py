"""Which physical blocks are free: a buddy allocator in Python, the reference for the one in Rust.

Blocks are numbered 0 .. num_blocks - 1. Free memory is kept as runs of 2^k blocks that begin at a multiple of 2^k. Two
neighbours of one size whose union begins at a multiple of the double size are buddies: both free, they merge. So a run
is found, split or merged in O(log n) (Knowlton, "A fast storage allocator", CACM 1965).

Three things are added for a cache that grows by a block at a time. A request names the block that it wants to continue
after, and gets what is free there first, so that its blocks stay neighbours. A request that begins, or that can't go on
where it is, goes to a place with `headroom` free blocks where there is one, so that it can stay there. And one call
serves a whole step of the scheduler.

Headroom helps as far as there is any. With F free blocks and R requests, one that must move finds about 2 F / R blocks
to grow into, for on average every hole is half used up. A thousand requests of 37 blocks, with headroom for 64 blocks,
1024 tokens, lie in 1.6, 2.6, 7.0 and 15 runs each when 70, 80, 90 and 95 % of the blocks are taken. More headroom
changes nothing, less than 16 costs where memory is free, and none at all means 18 to 23 runs (`python -m
phase1_memory.benchmark allocator`). Hence the default of `make_allocator`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from phase0_prototype.errors import UserError
from phase1_memory.runs import Allocator, Run, Want, refusal

log = logging.getLogger(__name__)


class BuddyAllocator:
    """See the module.

    Args:
        num_blocks: any positive number.
        headroom: blocks that a request would like to have free from where it begins, or begins anew.
    """

    def __init__(self, num_blocks: int, headroom: int = 1) -> None:
        if num_blocks < 1 or headroom < 1:
            raise ValueError(f"num_blocks={num_blocks}, headroom={headroom}: both must be at least 1")
        self.num_blocks, self.headroom = num_blocks, headroom
        self._orders = num_blocks.bit_length()
        self._free: list[dict[int, None]] = [{} for _ in range(self._orders)]  # start of each free run, newest last
        self._used = bytearray(num_blocks)  # 1 for each block in use
        self._num_free = 0
        self._put(Run(0, num_blocks))

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return self._num_free

    def largest_free_run(self) -> int:
        """Blocks of the longest buddy that is free; 0 when none is."""
        return next((1 << order for order in reversed(range(self._orders)) if self._free[order]), 0)

    def free_runs(self) -> list[Run]:
        """All free buddies by their start."""
        return sorted(Run(start, 1 << order) for order, starts in enumerate(self._free) for start in starts)

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """See `runs.Allocator`."""
        for want in wanted:
            if want.count < 0:
                raise ValueError(refusal(want, self.num_blocks))
        self._unmark(release)
        for run in release:
            self._put(run)
        return [self._serve(want) if want.count <= self._num_free else None for want in wanted]

    def _serve(self, want: Want) -> list[Run]:
        found: list[Run] = []
        left, after = want.count, want.after
        while left:
            run = self._take_at(after + 1, left) if after >= 0 else None
            if run is None:
                run = self._take_best(left)
            if found and sum(found[-1]) == run.start:
                found[-1] = Run(found[-1].start, found[-1].length + run.length)
            else:
                found.append(run)
            left, after = left - run.length, run.start + run.length - 1
        return found

    def _take_at(self, block: int, most: int) -> Run | None:
        """The largest aligned piece of at most `most` blocks that begins at `block`, if `block` is free."""
        if block >= self.num_blocks or self._used[block]:
            return None
        order = next(k for k in range(self._orders) if (block >> k << k) in self._free[k])
        start = block >> order << order
        del self._free[order][start]
        alignment = (block & -block).bit_length() - 1 if block else order
        wanted = min(order, alignment, most.bit_length() - 1)
        while order > wanted:  # keep the half that begins with or holds `block`, and free the other
            order -= 1
            half = 1 << order
            self._free[order][start if block & half else start + half] = None
            start += block & half
        size = 1 << wanted
        self._used[block : block + size] = b"\1" * size
        self._num_free -= size
        return Run(block, size)

    def _take_best(self, most: int) -> Run:
        """The first piece of the smallest free run with room for `most` and the headroom; else of the largest."""
        least = min(self._orders - 1, (max(most, self.headroom) - 1).bit_length())
        order = next((k for k in range(least, self._orders) if self._free[k]), None)
        if order is None:
            order = next(k for k in reversed(range(least)) if self._free[k])
        run = self._take_at(next(reversed(self._free[order])), most)
        assert run is not None
        return run

    def _put(self, run: Run) -> None:
        """Free an interval: its aligned pieces, each merged with its buddy as long as that is free too."""
        start, left = run
        self._num_free += left
        while left:
            order = min(left.bit_length(), (start & -start).bit_length() if start else self._orders) - 1
            self._merge(start, order)
            start, left = start + (1 << order), left - (1 << order)

    def _merge(self, start: int, order: int) -> None:
        while (buddy := start ^ (1 << order)) in self._free[order] and order + 1 < self._orders:
            del self._free[order][buddy]
            start, order = min(start, buddy), order + 1
        self._free[order][start] = None

    def _unmark(self, release: Sequence[Run]) -> None:
        """Blocks that are released are not in use any more: so a block that is named twice is noticed."""
        for index, run in enumerate(release):
            start, end = run.start, run.start + run.length
            if not 0 <= start < end <= self.num_blocks or self._used.find(0, start, end) >= 0:
                for start, length in release[:index]:
                    self._used[start : start + length] = b"\1" * length
                raise ValueError(refusal(run, self.num_blocks))
            self._used[start:end] = bytes(run.length)


def make_allocator(num_blocks: int, headroom: int = 64, kind: str = "auto") -> Allocator:
    """An allocator of these blocks.

    Args:
        num_blocks: at least 1.
        headroom: see the module; 1 packs as tightly as it can.
        kind: "rust", "python", or "auto": Rust where there is a library or a compiler for it, else Python, and a line
            in the log says why.

    Raises:
        UserError: another kind, or Rust was asked for and is not here.
    """
    from phase1_memory.rust_allocator import RustBuddyAllocator, why_not_rust

    if kind not in ("auto", "python", "rust"):
        raise UserError(f"allocator {kind!r} is not known: choose auto, python or rust")
    why = None if kind == "python" else why_not_rust()
    if kind == "rust" and why is not None:
        raise UserError(f"allocator 'rust' is not here: {why}, or choose 'auto' or 'python'")
    if kind == "python" or why is not None:
        if why is not None:
            _say(why)
        return BuddyAllocator(num_blocks, headroom)
    return RustBuddyAllocator(num_blocks, headroom)


@functools.cache
def _say(why: str) -> None:
    """Once a process: an engine is made many times in a test or a notebook."""
    log.warning("The block allocator runs in Python, which is slower: %s", why)
