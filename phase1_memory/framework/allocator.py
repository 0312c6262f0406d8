"""A free list: blocks come and go one at a time, last in, first out."""

from __future__ import annotations

from collections.abc import Sequence

from phase1_memory.allocator import Allocator, Run, Want


class BuddyAllocator:
    """See the module: no buddies yet.

    Args:
        num_blocks: any positive number.
        headroom: blocks that a new request would like to have free behind its first.
    """

    def __init__(self, num_blocks: int, headroom: int = 1) -> None:
        if num_blocks < 1 or headroom < 1:
            raise ValueError(f"num_blocks={num_blocks}, headroom={headroom}: both must be at least 1")
        self.num_blocks, self.headroom = num_blocks, headroom
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return len(self._free)

    def largest_free_run(self) -> int:
        """Blocks of the longest run that could be given in one piece."""
        return int(bool(self._free))

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """Take back `release`, then serve `wanted` in order."""
        given = [block for run in release for block in range(run.start, run.start + run.length)]
        taken = set(self._free)
        for block in given:
            if block in taken or not 0 <= block < self.num_blocks:
                raise ValueError(f"released {Run(block, 1)}: not in use")
            taken.add(block)
        # TASK 1.1: neighbours
        self._free += given
        return [self._serve(want) if 0 <= want.count <= len(self._free) else None for want in wanted]

    def _serve(self, want: Want) -> list[Run]:
        return [Run(self._free.pop(), 1) for _ in range(want.count)]


def make_allocator(num_blocks: int, headroom: int = 64, kind: str = "auto") -> Allocator:
    """An allocator of these blocks; kind: "auto", "python" or "rust"."""
    return BuddyAllocator(num_blocks, headroom)
