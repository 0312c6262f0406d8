"""Block tables: which physical block holds which tokens of a sequence, with reference counts and copy-on-write.

A sequence's tokens p * page .. (p+1) * page - 1 lie in block `table[p]`. A fork copies the table and no block: both
sequences then refer to the same memory (Kwon et al., 2023, arXiv 2309.06180, section 4.4). Before a sequence writes
into a block that others refer to as well, it gets a copy of its own.

The allocator is asked once a step, for all sequences together: what was freed since the last time goes back in the same
call.
"""

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
        self._freed: list[int] = []  # by no sequence any more, to be returned with the next call

    @property
    def num_blocks(self) -> int:
        """Blocks there are."""
        return self.allocator.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that no sequence refers to."""
        return self.allocator.num_free + len(self._freed)

    def pages(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.page)

    def reserve(self, writes: Sequence[Write]) -> list[tuple[int, int]] | None:
        """Make every token of `writes` writable without touching what other sequences see.

        Returns:
            (source, destination) blocks to be copied before anything is written, or None where not enough blocks are
            free: nothing has changed then, and the caller takes something away from somebody.
        """
        wanted: list[Want] = []
        growing: list[tuple[list[int], list[int]]] = []  # table, places in it that are shared
        leaving: dict[int, int] = {}  # block: references that this step takes off it
        total = 0
        for write in writes:
            table = self.tables.get(write.name)
            if table is None:
                table = self.tables[write.name] = []
            new = self.pages(write.end) - len(table)
            shared: list[int] = []
            for place in range(write.start // self.page, min(len(table), self.pages(write.end))):
                block = table[place]
                if self.references[block] - leaving.get(block, 0) > 1:
                    leaving[block] = leaving.get(block, 0) + 1
                    shared.append(place)
            if new > 0 or shared:
                wanted.append(Want(max(new, 0) + len(shared), table[-1] if table else -1))
                growing.append((table, shared))
                total += wanted[-1].count
        if total > self.num_free:
            for write in writes:
                if not self.tables[write.name]:
                    del self.tables[write.name]
            return None
        return self._take(wanted, growing) if wanted else []

    def fork(self, parent: str, child: str, num_tokens: int) -> int:
        """`child` begins where `parent` is; nothing is copied.

        Returns:
            How many of the parent's `num_tokens` tokens the child has: all.
        """
        table = self.tables[child] = list(self.tables[parent])
        for block in table:
            self.references[block] += 1
        return num_tokens

    def release(self, name: str) -> None:
        """The sequence is gone; blocks that nobody else refers to are free. Unknown names are ignored."""
        for block in self.tables.pop(name, ()):
            self.references[block] -= 1
            if not self.references[block]:
                self._freed.append(block)

    def shared_blocks(self) -> int:
        """Blocks that more than one sequence refers to."""
        return sum(1 for count in self.references if count > 1)

    def _take(self, wanted: list[Want], growing: list[tuple[list[int], list[int]]]) -> list[tuple[int, int]]:
        copies: list[tuple[int, int]] = []
        freed, self._freed = runs_of(self._freed), []
        for (table, shared), runs in zip(growing, self.allocator.step(freed, wanted), strict=True):
            assert runs is not None, "the allocator has fewer blocks than it says"
            blocks = [block for run in runs for block in range(run.start, run.start + run.length)]
            for block in blocks:
                self.references[block] = 1
            for place, block in zip(shared, blocks, strict=False):
                copies.append((table[place], block))
                self.references[table[place]] -= 1
                table[place] = block
            table += blocks[len(shared) :]
        return copies


def runs_of(blocks: Sequence[int]) -> list[Run]:
    """The same blocks as runs of neighbours, in ascending order."""
    runs: list[Run] = []
    start = end = -1
    for block in sorted(blocks):
        if block != end:
            if end > start:
                runs.append(Run(start, end - start))
            start = block
        end = block + 1
    if end > start:
        runs.append(Run(start, end - start))
    return runs
