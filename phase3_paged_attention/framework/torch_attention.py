"""Attention over pages on a CPU: in every layer, all decodes are gathered side by side, as long as the longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec, decode_mask
from phase0_prototype.batch import Batch
from phase1_memory.attention import PagedPlan
from phase1_memory.attention import PagedTorchAttention as Phase1Attention
from phase3_paged_attention.cached_attention import KV, Sequence, attend_sequence, padded_decode, sequences_of


@dataclass(frozen=True)
class Plan:
    """One step's work.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's key and value are written.
        rows: of q, the sequences of one token, [decodes] int64.
        blocks: of these, [decodes, n] int64; shorter tables are filled up with any block.
        masks: for each window, [decodes, 1, 1, n * P] bool, true where the token may be read.
        sequences: the others.
    """

    slots: tuple[Tensor, Tensor]
    rows: Tensor
    blocks: Tensor
    masks: dict[int | None, Tensor]
    sequences: tuple[Sequence, ...]

    @property
    def shape(self) -> None:
        """Nothing of this plan repeats: it can't be captured."""
        return None


class PagedTorchAttention(Phase1Attention):
    """Any device, any dtype, any cache: the oracle of the kernels, and the path of CPUs.

    Args:
        round_up: above 1, decodes gather a multiple of this many tokens: see `steady`.
    """

    def steady(self, round_up: int) -> PagedTorchAttention:
        """For compiled and captured steps: shapes are few."""
        return PagedTorchAttention(round_up)

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Nothing: this backend serves every model on every device."""
        return []

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int, visible: Tensor | None = None) -> Any:
        """Split the batch into decodes and sequences.

        Args:
            batch, windows, block_size: see `AttentionBackend`.
            visible: [T] int64, see `kernels.paged.Tables`; None: plainly causal.
        """
        device = batch.token_ids.device
        if self.round_up > 1 and visible is None and max(batch.query_lens) == 1 < min(batch.kv_lens):
            return super().plan(batch, windows, block_size)
        one = [i for i, n in enumerate(batch.query_lens) if n == 1 and visible is None]
        others = sorted({*range(batch.num_seqs)} - {*one})
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        # TASK 3.3: every table is filled up to the longest, and a window doesn't shorten it. Sort the decodes, cut them
        # into groups of nearly one length, and leave out what no window shows.
        which = torch.tensor(one, dtype=torch.int64, device=device)
        pages = -(-max([batch.kv_lens[i] for i in one], default=0) // block_size)
        blocks = batch.block_tables[which, :pages]
        masks = {w: decode_mask(batch.seq_lens[which], pages * block_size, w) for w in windows}
        sequences = sequences_of(batch, others, block_size, visible)
        return Plan(slots, batch.query_start[which], blocks, masks, sequences)

    def run(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: KV, plan: Any) -> Tensor:
        """Attend; the new keys and values are in the cache by now.

        Args:
            spec: the layer's shape.
            q: [T, Hq, D], rotated.
            k, v: [T, Hkv, D], k rotated: the new ones, for those whose past is empty.
            kv: the layer's cache.
            plan: of this step.

        Returns:
            [T, Hq * D].
        """
        if isinstance(plan, PagedPlan):
            mask = plan.masks[spec.window]
            assert isinstance(plan.blocks, Tensor) and mask is not None
            return padded_decode(spec, q, kv, plan.blocks, mask)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device).flatten(1)  # [T, Hq * D]
        if len(plan.rows):
            # TASK 3.3: this writes all keys and values to memory and reads them back. A group at a time stays in the
            # CPU's cache, where attention finds it.
            out[plan.rows] = padded_decode(spec, q[plan.rows], kv, plan.blocks, plan.masks[spec.window])
        for seq in plan.sequences:
            rows = slice(seq.start, seq.end)
            out[rows] = attend_sequence(spec, q[rows], kv, seq, (k[rows], v[rows])).flatten(1)
        return out
