"""Attention over pages on a CPU: decodes in groups that stay in its cache from the gather to the softmax.

Phase 1 gathers the blocks of all decodes side by side, in every layer: 32 sequences of 1,024 tokens are 32 MiB that are
written to memory and read back. Here:

* A group of sequences at a time is gathered (decode_groups.py). What is written stays in the CPU's cache until it is
  attended to, and the next group is written over it. So the cache is read from memory once, by the gather, and torch's
  attention doesn't wait for it any more: both together take about as long as attention to a cache without pages.
* A group's sequences have nearly one length, and a window is all that is read: work goes with the sum of lengths.
* What torch's attention can't do (soft caps, FP8, a sequence in pieces) is two matrix products in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase1_memory.attention import PagedPlan
from phase1_memory.attention import PagedTorchAttention as Phase1Attention
from phase3_paged_attention.cached_attention import (
    KV,
    Sequence,
    attend_sequence,
    capped,
    gather,
    padded_decode,
    scales_of,
    sequences_of,
)
from phase3_paged_attention.decode_groups import Decodes, Group, Piece, group_decodes


@dataclass(frozen=True)
class Plan:
    """One step's work.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's key and value are written.
        decodes: for each window, the sequences of one token; empty: there are none.
        sequences: the others.
    """

    slots: tuple[Tensor, Tensor]
    decodes: dict[int | None, Decodes]
    sequences: tuple[Sequence, ...]

    @property
    def shape(self) -> None:
        """Nothing of this plan repeats: it can't be captured."""
        return None


class PagedTorchAttention(Phase1Attention):
    """Any device, any dtype, any cache: the oracle of the kernels, and the path of CPUs.

    Args:
        round_up: above 1, decodes gather a multiple of this many tokens, all at once: see `steady`.
    """

    def steady(self, round_up: int) -> PagedTorchAttention:
        """For compiled and captured steps: shapes are few, so all decodes are padded to one length."""
        return PagedTorchAttention(round_up)

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Nothing: this backend serves every model on every device."""
        return []

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int, visible: Tensor | None = None) -> Any:
        """Split the batch into decodes, in groups, and sequences.

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
        decodes = {}
        if one:
            starts = list(accumulate(batch.query_lens, initial=0))
            rows, lengths = [starts[i] for i in one], [batch.kv_lens[i] for i in one]
            tables = [batch.blocks[i] for i in one]
            decodes = {w: group_decodes(rows, lengths, tables, w, block_size, device) for w in windows}
        return Plan(slots, decodes, sequences_of(batch, others, block_size, visible))

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
        attended = None
        if plan.decodes:
            decodes = plan.decodes[spec.window]
            queries = q[decodes.rows].split([group.size for group in decodes.groups])
            done = [attend_group(spec, *both, kv) for both in zip(decodes.groups, queries, strict=True)]
            attended = done[0] if len(done) == 1 else torch.cat(done)
            if not plan.sequences and isinstance(decodes.rows, slice):
                return attended.flatten(1)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # [T, Hq, D]
        if attended is not None:
            out[decodes.rows] = attended
        for seq in plan.sequences:
            rows = slice(seq.start, seq.end)
            out[rows] = attend_sequence(spec, q[rows], kv, seq, (k[rows], v[rows]))
        return out.flatten(1)


def attend_group(spec: AttentionSpec, group: Group, q: Tensor, kv: KV) -> Tensor:
    """Softmax attention of one query a sequence.

    Args:
        spec: the layer's shape.
        group: the sequences.
        q: [size, Hq, D].
        kv: the layer's cache.

    Returns:
        [size, Hq, D] in q's type.
    """
    if len(group.pieces) == 1 and spec.soft_cap is None and len(kv) == 2:
        key, value = (_fetch(side, None, group, group.pieces[0]).transpose(1, 2) for side in kv)  # [size, Hkv, N, D]
        seen = None if group.hidden is None else ~group.hidden[:, None, None]
        queries = q.unflatten(1, (spec.num_kv_heads, -1))  # [size, Hkv, G, D]
        return sdpa(queries, key, value, attn_mask=seen, scale=spec.scale).reshape(q.shape)
    return _by_products(spec, group, q, kv)


def _by_products(spec: AttentionSpec, group: Group, q: Tensor, kv: KV) -> Tensor:
    """`attend_group` in float32. All scores are made before the first value is read: the softmax is the plain one."""
    exact = torch.promote_types(q.dtype, torch.float32)
    queries = (q.to(exact) * spec.scale).unflatten(1, (spec.num_kv_heads, -1)).flatten(0, 1)  # [size * Hkv, G, D]
    k_scale, v_scale = scales_of(kv)
    parts = []
    for piece in group.pieces:
        key = _fetch(kv[0], k_scale, group, piece).to(exact)  # [size, N, Hkv, D]
        parts.append(queries.new_empty(*queries.shape[:2], key.shape[1]))
        for some, of_queries, of_scores in _by_sequence(key, queries, parts[-1]):
            torch.bmm(of_queries, some.transpose(1, 2), out=of_scores)
    scores = capped(torch.cat(parts, -1), spec.soft_cap)  # [size * Hkv, G, tokens]
    if group.hidden is not None:
        scores.view(group.size, -1, scores.shape[-1]).masked_fill_(group.hidden.unsqueeze(1), -torch.inf)
    torch.softmax(scores, -1, out=scores)
    out = torch.zeros_like(queries)
    for piece, weights in zip(group.pieces, scores.split([part.shape[-1] for part in parts], -1), strict=True):
        value = _fetch(kv[1], v_scale, group, piece).to(exact)
        for some, of_weights, of_out in _by_sequence(value, weights, out):
            of_out.baddbmm_(of_weights, some)
    return out.view(q.shape).to(q.dtype)


def _fetch(side: Tensor, scale: Tensor | None, group: Group, piece: Piece) -> Tensor:
    """Keys or values of a piece, [size, N, Hkv, D]; what may not be read is 0."""
    found = gather(side, scale, piece.blocks, piece.pages)
    if group.filler is not None:  # several sequences: never a view of the cache
        found.index_fill_(0, group.filler, 0)
    return found.unflatten(0, (group.size, -1))[:, piece.begin : piece.end]


def _by_sequence(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matrices for products: [Hkv, N, D] of x [size, N, Hkv, D], with the same heads of others [size * Hkv, ...].

    A product reads rows at any distance: a call for each sequence costs less than a copy with heads in front.
    """
    parts = (other.unflatten(0, (len(x), -1)).unbind() for other in others)
    return zip(x.transpose(1, 2).unbind(), *parts, strict=True)
