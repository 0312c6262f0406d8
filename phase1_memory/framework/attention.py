"""Attention over blocks, one sequence at a time: fetch its blocks one by one, put them together, attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_attention, causal_mask


@dataclass(frozen=True)
class Sequence:
    """A sequence in the flat batch.

    Attributes:
        start, end: its tokens in the batch.
        kv_len: its length, including what is in the cache.
        blocks: its block table, [n] int64.
    """

    start: int
    end: int
    kv_len: int
    blocks: Tensor | int | None


@dataclass(frozen=True)
class PagedPlan:
    """One step's work.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's key and value are written.
        sequences: all of them.
        causal: for each (sequence, window) [q, kv] bool; absent: plain causal from the first token.
    """

    slots: tuple[Tensor, Tensor]
    sequences: tuple[Sequence, ...]
    causal: dict[tuple[int, int | None], Tensor]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """What a captured step is kept by. None: nothing of this plan repeats."""
        return None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of a plan that has a shape."""
        raise NotImplementedError("a plan of sequences has no fixed shape")

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> PagedPlan:
        """The same plan with these."""
        raise NotImplementedError("a plan of sequences has no fixed shape")


class PagedTorchAttention:
    """`causal_attention` on gathered blocks; any device, any dtype.

    Args:
        round_up: decodes gather a multiple of this many tokens. A compiled or captured step needs few distinct lengths;
            eager steps read exactly the blocks that are there (1).
    """

    def __init__(self, round_up: int = 1) -> None:
        self.round_up = round_up

    def steady(self, round_up: int) -> PagedTorchAttention:
        """See `AttentionBackend`."""
        return PagedTorchAttention(round_up)

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Nothing: this backend serves every model on every device."""
        return []

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int) -> PagedPlan:
        """Build what layers share."""
        sequences: list[Sequence] = []
        causal: dict[tuple[int, int | None], Tensor] = {}
        start = 0
        for i, (length, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
            for w in windows:
                mask = causal_mask(length, kv_len, w, batch.token_ids.device)
                causal.update({} if mask is None else {(i, w): mask})
            table = batch.block_tables[i, : -(-kv_len // block_size)]
            sequences.append(Sequence(start, start + length, kv_len, table))
            start += length
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        return PagedPlan(slots, tuple(sequences), causal)

    def run(
        self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, Tensor], plan: PagedPlan
    ) -> Tensor:
        """Attend; the new keys and values are in the cache by now.

        Args:
            spec: the layer's shape.
            q: [T, Hq, D], rotated.
            k, v: [T, Hkv, D], k rotated: the new ones, for those whose past is empty.
            kv: the layer's cache, two of [blocks, page, Hkv, D].
            plan: of this step.

        Returns:
            [T, Hq * D].
        """
        out = torch.empty_like(q).flatten(1)  # [T, Hq * D]
        for i, seq in enumerate(plan.sequences):
            rows = slice(seq.start, seq.end)
            # TASK 1.5: a prompt's own keys are at hand; neighbouring blocks can be read where they lie; and the decodes
            # of a batch can share one gather and one call.
            assert isinstance(seq.blocks, Tensor)
            blocks = seq.blocks.tolist()
            key, value = (torch.cat([side[block] for block in blocks])[: seq.kv_len] for side in kv)
            attended = causal_attention(q[rows], key, value, spec.scale, spec.window, plan.causal.get((i, spec.window)))
            out[rows] = attended.flatten(1)
        return out
