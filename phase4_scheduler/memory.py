"""What a scheduler asks of the KV cache, and a cache that only counts.

`PagedKVCache` of phase 1 is such a memory, with tensors behind it. `CountedMemory` has the same block tables and none
of the bytes: simulations, tests and the engine without a model run on it, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from phase0_prototype.request import Request
from phase1_memory.block_tables import BlockTables
from phase1_memory.runs import Allocator, Write


class Memory(Protocol):
    """Blocks of sequences."""

    tables: BlockTables

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""

    def reserve(self, writes: Sequence[Write]) -> bool:
        """Make room for these tokens, all or none; False where not enough blocks are free."""

    def fork(self, parent: Request, child: Request) -> None:
        """`child` begins with the computed tokens of `parent`, in the same blocks."""

    def release(self, request: Request) -> None:
        """Take the request's blocks back."""


class Swap(Protocol):
    """Where preempted sequences wait with what they have computed."""

    def out(self, request: Request) -> bool:
        """Keep a copy of the request's blocks, which the caller releases then; False where there is no room."""

    def ready(self, request: Request) -> bool:
        """Begin to bring them near; whether `back` would not wait."""

    def back(self, request: Request) -> bool:
        """Write them into the blocks that the request holds now, and forget them; False: they were lost."""

    def drop(self, request: Request) -> None:
        """Forget them."""


class CountedMemory:
    """Block tables without a cache.

    Args:
        allocator: hands out the blocks.
        block_size: tokens in a block.
    """

    def __init__(self, allocator: Allocator, block_size: int = 16) -> None:
        self.tables = BlockTables(allocator, block_size)
        self.block_size = block_size
        self.copied_blocks = 0

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return self.tables.num_free

    def reserve(self, writes: Sequence[Write]) -> bool:
        """See `Memory`; counts copies of shared blocks."""
        copies = self.tables.reserve(writes)
        self.copied_blocks += len(copies or ())
        return copies is not None

    def fork(self, parent: Request, child: Request) -> None:
        """See `Memory`."""
        computed = parent.num_computed_tokens
        child.num_computed_tokens = self.tables.fork(parent.request_id, child.request_id, computed)

    def release(self, request: Request) -> None:
        """See `Memory`."""
        self.tables.release(request.request_id)


class CountedSwap:
    """Room for so many blocks of preempted sequences, and no bytes."""

    def __init__(self, memory: CountedMemory, num_blocks: int) -> None:
        self.memory, self.free = memory, num_blocks
        self.kept: dict[str, int] = {}

    def out(self, request: Request) -> bool:
        """See `Swap`."""
        blocks = self.memory.tables.pages(request.num_computed_tokens)
        if blocks > self.free:
            return False
        self.free -= blocks
        self.kept[request.request_id] = blocks
        return True

    def ready(self, request: Request) -> bool:
        """See `Swap`."""
        return True

    def back(self, request: Request) -> bool:
        """See `Swap`."""
        self.drop(request)
        return True

    def drop(self, request: Request) -> None:
        """See `Swap`."""
        self.free += self.kept.pop(request.request_id)


class StoreSwap:
    """Phase 1's offload store, as a scheduler sees it.

    Args:
        kv: a `PagedKVCache`.
        store: phase 1's `Store`.
    """

    def __init__(self, kv: Any, store: Any) -> None:
        self.kv, self.store = kv, store

    def out(self, request: Request) -> bool:
        """See `Swap`."""
        used = self.kv.blocks(request)[: self.kv.tables.pages(request.num_computed_tokens)]
        return bool(self.store.save(request.request_id, self.kv.read(used)))

    def ready(self, request: Request) -> bool:
        """See `Swap`."""
        self.store.prefetch(request.request_id)
        return bool(self.store.ready(request.request_id))

    def back(self, request: Request) -> bool:
        """See `Swap`."""
        data = self.store.load(request.request_id)
        if data is not None:
            self.kv.write(self.kv.blocks(request)[: len(data)], data)
        return data is not None

    def drop(self, request: Request) -> None:
        """See `Swap`."""
        self.store.drop(request.request_id)
