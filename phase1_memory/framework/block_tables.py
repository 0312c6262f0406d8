"""Block tables without sharing: every sequence has blocks of its own, and asks for them one request at a time."""

from __future__ import annotations

from collections.abc import Sequence

from phase1_memory.runs import Allocator, Run, Want, Write


class BlockTables:
    """The tables of all sequences that hold memory.

    Args:
        allocator: hands out the blocks.
        page: tokens in a block.
    """

    def __init__(self, allocator: Allocator, page: int) -> None:
        self.allocator, self.page = allocator, page
        self.tables: dict[str, list[int]] = {}
        self.references = [0] * allocator.num_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks there are."""
        return self.allocator.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that no sequence refers to."""
        return self.allocator.num_free

    def pages(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.page)

    def reserve(self, writes: Sequence[Write]) -> list[tuple[int, int]] | None:
        """Make every token of `writes` writable without touching what other sequences see.

        Returns:
            (source, destination) blocks to be copied before anything is written, or None where not enough blocks are
            free: nothing has changed then, and the caller takes something away from somebody.
        """
        missing = {w.name: max(0, self.pages(w.end) - len(self.tables.get(w.name, ()))) for w in writes}
        if sum(missing.values()) > self.num_free:
            return None
        # TASK 1.2: one call of the allocator serves all writes of a step, and takes back what was freed since the last.
        for name, count in missing.items():
            table = self.tables.setdefault(name, [])
            for _ in range(count):
                (runs,) = self.allocator.step([], [Want(1, table[-1] if table else -1)])
                assert runs is not None
                table.append(runs[0].start)
                self.references[runs[0].start] = 1
        return []

    def fork(self, parent: str, child: str, num_tokens: int) -> int:
        """`child` begins where `parent` is.

        Returns:
            How many of the parent's `num_tokens` tokens the child has.
        """
        # TASK 1.2: none, so every continuation computes the prompt again, into blocks of its own.
        self.tables[child] = []
        return 0

    def release(self, name: str) -> None:
        """The sequence is gone; blocks that nobody else refers to are free. Unknown names are ignored."""
        for block in self.tables.pop(name, ()):
            self.references[block] = 0
            self.allocator.step([Run(block, 1)], [])

    def shared_blocks(self) -> int:
        """Blocks that more than one sequence refers to."""
        return sum(1 for count in self.references if count > 1)


def runs_of(blocks: Sequence[int]) -> list[Run]:
    """The same blocks as runs of neighbours, in ascending order."""
    # TASK 1.2: blocks that follow one another are one run.
    return [Run(block, 1) for block in sorted(blocks)]
