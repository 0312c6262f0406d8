"""A KV cache that keeps nothing: every step starts over from the first token."""

from __future__ import annotations

import torch
from torch import Tensor

from phase0_prototype.kv_spec import KVSpec
from phase0_prototype.request import Request


class KVCache:
    """Hands out rows, as a real cache would, and has no memory behind them.

    Args:
        spec: what one token needs.
        max_num_seqs: rows.
        max_model_len: tokens in a row, which is also the block size of this cache.
        device: where the memory lies.
    """

    def __init__(self, spec: KVSpec, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self.spec = spec
        self.block_size = max_model_len
        self.num_rows = max_num_seqs
        nothing = torch.zeros(0, max_model_len, spec.num_kv_heads, spec.head_dim)
        self.layers = ((nothing, nothing),) * spec.num_layers
        self.owners: list[Request] = []  # owners[row]
        # TASK 0.1: allocate keys and values of every layer, each [rows, max_model_len, Hkv, D], on `device`.

    @property
    def num_free(self) -> int:
        """Sequences that can still be admitted."""
        return self.num_rows - len(self.owners)

    def acquire(self, request: Request) -> None:
        """Give the request a row; the caller has checked `num_free`."""
        assert self.num_free > 0, "admitted more sequences than the cache has rows"
        self.owners.append(request)

    def release(self, request: Request) -> None:
        """Take the request's row back. Running rows stay dense, so rows above it move down by one."""
        # TASK 0.1: once a row holds keys and values, they must move with it (and one row moved is enough).
        self.owners.remove(request)

    def blocks(self, request: Request) -> tuple[int, ...]:
        """The request's block table: here its one row."""
        return (self.owners.index(request),)

    def computed(self, request: Request, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens, all just written, can be read back by the next step."""
        # TASK 0.1: none, so the next step computes the whole sequence again: n tokens cost n(n+1)/2.
        return 0

    def spare(self, blocks: tuple[tuple[int, ...], ...], count: int) -> tuple[tuple[int, ...], ...] | None:
        """Block tables of `count` sequences that are not there, to fill up a batch: what they write is never read.

        They are free rows behind those of the batch, `blocks`; None where there are not so many.
        """
        first = blocks[0][0] + len(blocks)
        rows = range(first, first + count)
        fits = rows.stop <= self.num_rows and rows.start >= len(self.owners)
        return tuple((row,) for row in rows) if fits else None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [rows, block_size, Hkv, D]."""
        return self.layers[index]
