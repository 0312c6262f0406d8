"""The KV cache of phase 0: one contiguous row of `max_model_len` tokens for every sequence that can run at once.

Keys and values of a token never change once computed, so keeping them turns the n-th decode step from n tokens of work
into one. The price is memory, reserved for the longest possible sequence whether it comes or not; phase 1 pages it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from phase0_prototype.kv_spec import KVSpec
from phase0_prototype.request import Request


class KVCache:
    """Rows of keys and values; running requests always occupy rows 0..B-1, so a batch reads them as one slice.

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

        def rows(width: int) -> Tensor:  # a tensor of its own: torch.compile copies what is changed through a view
            return torch.zeros(max_num_seqs, max_model_len, spec.num_kv_heads, width, dtype=spec.dtype, device=device)

        keys, values = spec.widths
        self.layers = tuple((rows(keys), rows(values)) for _ in range(spec.num_layers))
        self.owners: list[Request] = []  # owners[row]

    @property
    def num_free(self) -> int:
        """Sequences that can still be admitted."""
        return self.num_rows - len(self.owners)

    def acquire(self, request: Request) -> None:
        """Give the request a row; the caller has checked `num_free`."""
        assert self.num_free > 0, "admitted more sequences than the cache has rows"
        self.owners.append(request)

    def release(self, request: Request) -> None:
        """Take the request's row back. The last row moves into the gap: running rows stay dense."""
        row, last = self.owners.index(request), len(self.owners) - 1
        if row != last:
            used = self.owners[last].num_computed_tokens
            for side in itertools.chain.from_iterable(self.layers):
                side[row, :used] = side[last, :used]
            self.owners[row] = self.owners[last]
        self.owners.pop()

    def blocks(self, request: Request) -> tuple[int, ...]:
        """The request's block table: here its one row."""
        return (self.owners.index(request),)

    def computed(self, request: Request, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens, all just written, can be read back by the next step: all."""
        return num_tokens

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
