"""A store that keeps the engine waiting: every byte is moved while nothing else happens, one block at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from phase1_memory.offload_file import open_tiers
from phase1_memory.offload_tiers import LOSSES, Slots, Tier

log = logging.getLogger(__name__)


class OffloadStore:
    """Keeps the blocks of requests that were swapped out. Its methods are called from one thread, the engine's.

    Args:
        tiers: nearest first; the store owns them and closes them.
        block_bytes: bytes of a KV block, all layers.
        device: where `load` puts the blocks.
        max_pending_bytes: staging memory that may wait for a file; beyond it `save` waits for the disk.
        patience: seconds that any call waits at most. A disk that takes longer is taken for dead.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        block_bytes: int,
        device: torch.device,
        *,
        max_pending_bytes: int = 1 << 28,
        patience: float = 30.0,
    ) -> None:
        self.tiers, self.block_bytes, self.device = tuple(tiers), block_bytes, device
        self.where: dict[str, tuple[Tier, Slots]] = {}
        self.lost: dict[str, str] = {}  # request: why
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def used_blocks(self) -> int:
        """Slots that are taken, in all tiers."""
        return sum(tier.used_blocks for tier in self.tiers)

    @property
    def pending_bytes(self) -> int:
        """Staging memory that waits for a file."""
        return 0

    def save(self, key: str, blocks: Tensor) -> bool:
        """Take over a request's blocks; False where no tier has room.

        Args:
            key: names the request until it is loaded or dropped.
            blocks: [n, block_bytes] uint8, contiguous, on the store's device.
        """
        if self.closed:
            raise RuntimeError(f"save({key!r}) after the store was closed")
        if key in self.where:
            raise ValueError(f"request {key!r} is saved already: load or drop it first")
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != self.block_bytes:
            raise ValueError(f"blocks are {blocks.dtype} {list(blocks.shape)}: uint8 [n, {self.block_bytes}] is wanted")
        for tier in self.tiers:
            slots = tier.take(len(blocks))
            if slots is not None:
                self.where[key] = tier, slots
                try:
                    # TASK 1.4: the engine waits here until the last block is on the disk, with one call of the system
                    # a block. Only the bytes must be safe from the engine when `save` returns, not written.
                    for slot, block in zip(slots, blocks, strict=True):
                        tier.write((slot,), block[None].cpu())
                except LOSSES as error:
                    self.lost[key] = str(error)
                return True
        return False

    def prefetch(self, key: str) -> None:
        """Begin to bring a request's blocks to the device; again does nothing."""
        # TASK 1.4: the scheduler knows which request comes next while another step is computed. Read meanwhile.
        assert key in self.where

    def ready(self, key: str) -> bool:
        """Whether `load` would return at once, be it with nothing."""
        # TASK 1.4: once something can be on its way, say whether it has arrived.
        return key in self.where

    def load(self, key: str) -> Tensor | None:
        """Hand back a request's blocks, [n, block_bytes] uint8 on the device, and forget them; None: they are lost."""
        tier, slots = self.where[key]
        blocks = torch.empty(len(slots), self.block_bytes, dtype=torch.uint8, device=self.device)
        why = self.lost.get(key)
        try:
            # TASK 1.4: the engine waits for a disk here. What was prefetched, or not written yet, is in memory.
            for row, slot in enumerate(slots) if why is None else ():
                blocks[row] = tier.read((slot,), self.device)[0]
        except LOSSES as error:
            why = str(error)
        self.drop(key)
        if why is not None:
            log.warning("offload: request %s is computed again: %s", key, why)
            return None
        return blocks

    def drop(self, key: str) -> None:
        """Forget a request's blocks. Names that are unknown, or known no more, are ignored."""
        tier, slots = self.where.pop(key, (None, ()))
        self.lost.pop(key, None)
        for slot in slots:
            assert tier is not None
            tier.free((slot,))

    def close(self) -> None:
        """Forget everything and close the tiers."""
        self.where.clear()
        if not self.closed:
            self.closed = True
            for tier in self.tiers:
                tier.close()

    def describe(self) -> str:
        """Tiers and their fill, in a line."""
        return ", ".join([f"{len(self.where)} requests", *(tier.describe() for tier in self.tiers)])


def open_store(
    block_bytes: int, device: torch.device, memory_bytes: int, directory: str | Path | None, file_bytes: int
) -> OffloadStore:
    """A store with a tier in host memory, if `memory_bytes`, and one in a file, if there is a `directory` for it.

    Raises:
        UserError: see `open_tiers`.
    """
    return OffloadStore(open_tiers(block_bytes, device, memory_bytes, directory, file_bytes), block_bytes, device)
