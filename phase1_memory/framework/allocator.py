"""A free list: blocks come back one at a time and go one at a time, the last that came first."""

from __future__ import annotations

from collections.abc import Sequence

from phase1_memory.runs import Allocator, Run, Want


class BuddyAllocator:
    """Knows which blocks are free, and nothing of neighbours.

    Args:
        num_blocks: any positive number.
        headroom: blocks that a request would like to have free from where it begins, or begins anew.
    """

    def __init__(self, num_blocks: int, headroom: int = 1) -> None:
        if num_blocks < 1 or headroom < 1:
            raise ValueError(f"num_blocks={num_blocks}, headroom={headroom}: both must be at least 1")
        self.num_blocks, self.headroom = num_blocks, headroom
        # TASK 1.1: keep free memory as runs of 2^k blocks, by k, so that a long run is as quickly found as a block.
        self._stack = list(reversed(range(num_blocks)))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return len(self._stack)

    def largest_free_run(self) -> int:
        """Blocks of the longest run that could be given in one piece; 0 when nothing is free."""
        # TASK 1.1: more than one, once neighbours know of each other.
        return min(1, len(self._stack))

    def free_runs(self) -> list[Run]:
        """All free runs by their start."""
        return [Run(block, 1) for block in sorted(self._stack)]

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """Take back `release`, then serve `wanted` in order: each whole, or not at all where not enough is free (None).

        Raises:
            ValueError: blocks are released that are not in use, or fewer than 0 are wanted. Nothing has changed then.
        """
        back: dict[int, None] = {}
        for run in release:
            blocks = range(run.start, run.start + run.length)
            if not blocks or run.start < 0 or blocks[-1] >= self.num_blocks:
                raise ValueError(f"released {run}: not within the {self.num_blocks} blocks")
            for block in blocks:
                if self._is_free[block] or block in back:
                    raise ValueError(f"released {run}: block {block} is not in use, or is released twice")
                back[block] = None
        if any(want.count < 0 for want in wanted):
            raise ValueError("wanted fewer than 0 blocks")
        # TASK 1.1: a run that comes back merges with its free neighbours, by halves of one size.
        for block in back:
            self._is_free[block] = True
            self._stack.append(block)
        return [self._serve(want) if want.count <= self.num_free else None for want in wanted]

    def _serve(self, want: Want) -> list[Run]:
        # TASK 1.1: blocks that follow one another: behind `want.after` if they are free, else in a run with room for
        # them and the headroom. Neighbours are one run.
        found: list[Run] = []
        for _ in range(want.count):
            block = self._stack.pop()
            self._is_free[block] = False
            found.append(Run(block, 1))
        return found


def make_allocator(num_blocks: int, headroom: int = 64, kind: str = "auto") -> Allocator:
    """An allocator of these blocks.

    Args:
        num_blocks: at least 1.
        headroom: see `BuddyAllocator`.
        kind: "python", "rust" or "auto": here they are all the same.
    """
    return BuddyAllocator(num_blocks, headroom)
