"""Attention to a cache in torch, one sequence or one padded batch at a time: what is always right, on any device.

Every way of the course to attend is served: windows, soft caps, masks of trees, FP8 caches. What lies behind a
sequence's last token is never multiplied, not even by 0: it may be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_attention
from phase1_memory.attention import neighbours
from phase3_paged_attention.kernels.reference import visible_keys

KV = tuple[Tensor, ...]  # keys and values [blocks, P, Hkv, D], and for FP8 the scales of both
SCORES = 4 << 20  # numbers in a block of scores: 16 MiB


@dataclass(frozen=True)
class Sequence:
    """A prompt, a chunk or a tree in the flat batch.

    Attributes:
        start, end: its tokens in the batch.
        kv_len: its length, including what is in the cache.
        blocks: its block table on the device, [n] int64, or the first block where all are neighbours.
        bits: of a tree, [end - start] int64, see `kernels.paged.Tables`; None: plainly causal.
    """

    start: int
    end: int
    kv_len: int
    blocks: Tensor | int
    bits: Tensor | None = None

    def first(self, window: int | None) -> int:
        """The first token that any of its queries sees."""
        return 0 if window is None else max(0, self.kv_len - (self.end - self.start) + 1 - window)


def sequences_of(batch: Batch, which: List[int], block_size: int, visible: Tensor | None) -> tuple[Sequence, ...]:
    """Those of a batch, by their index; `visible` is [T] int64."""
    starts = list(accumulate(batch.query_lens, initial=0))
    found = []
    for i in which:
        start, end, pages = starts[i], starts[i + 1], -(-batch.kv_lens[i] // block_size)
        table = batch.blocks[i][:pages]
        blocks = table[0] if neighbours(table) else batch.block_tables[i, :pages]
        found.append(Sequence(start, end, batch.kv_lens[i], blocks, None if visible is None else visible[start:end]))
    return tuple(found)


def gather(side: Tensor, scale: Tensor | None, blocks: Tensor | int, pages: int | None = None) -> Tensor:
    """Keys or values in the order of a block table; a view where neither a copy nor a scale is needed.

    Args:
        side: [blocks, P, Hkv, D], of any type.
        scale: of FP8, [1] or [blocks, P, Hkv] float32; None: the numbers are what they are.
        blocks: [n] int64, or the first of `pages` neighbours.

    Returns:
        [n * P, Hkv, D] in side's type; FP8: in float32.
    """
    if isinstance(blocks, int):
        assert pages is not None
        found, scales = side[blocks : blocks + pages], scale
        if scale is not None and scale.numel() > 1:
            scales = scale[blocks : blocks + pages]
    else:
        found, scales = _indexable(side).index_select(0, blocks).view(side.dtype), scale
        if scale is not None and scale.numel() > 1:
            scales = scale.index_select(0, blocks)
    if scales is not None:
        found = found.float() * scales.unsqueeze(-1)
    return found.flatten(0, 1)


def _indexable(side: Tensor) -> Tensor:
    """Bytes in place of FP8, which torch doesn't index on every device."""
    return side.view(torch.uint8) if side.element_size() == 1 else side


def attend_sequence(
    spec: AttentionSpec, q: Tensor, kv: KV, seq: Sequence, new: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The last tokens of a sequence over all of it.

    Args:
        spec: the layer's shape.
        q: [Tq, Hq, D], its queries.
        kv: the layer's cache.
        seq: whose tokens.
        new: its new keys and values [Tq, Hkv, D], which are all where the sequence begins here. An FP8 cache is read
            all the same: it has them as later steps will see them.

    Returns:
        [Tq, Hq, D] in q's type.
    """
    tokens, page, window = len(q), kv[0].shape[1], spec.window
    skipped = seq.first(window) // page
    if new is not None and seq.kv_len == tokens and len(kv) == 2:
        k, v = new
    else:
        pages, length = -(-seq.kv_len // page) - skipped, seq.kv_len - skipped * page
        blocks = seq.blocks + skipped if isinstance(seq.blocks, int) else seq.blocks[skipped:]
        k, v = (gather(side, scale, blocks, pages)[:length] for side, scale in zip(kv[:2], scales_of(kv), strict=True))
    exact = q.to(torch.promote_types(q.dtype, k.dtype))  # FP8 was made float32, and half of that would be lost again
    if spec.soft_cap is None and seq.bits is None:
        return causal_attention(exact, k, v, spec.scale, window).to(q.dtype)
    seen = visible_keys(tokens, len(k), window, seq.bits, q.device)
    return masked_attention(exact, k, v, spec.scale, seen, spec.soft_cap).to(q.dtype)


def scales_of(kv: KV) -> tuple[Tensor | None, Tensor | None]:
    """The scales of keys and values; None: these are not FP8."""
    return (kv[2], kv[3]) if len(kv) == 4 else (None, None)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, soft_cap: float | None = None
) -> Tensor:
    """Softmax attention by products in float32, for masks and scores that torch's own doesn't know.

    Args:
        q: [Tq, Hq, D].
        k, v: [Tk, Hkv, D].
        scale: of the scores.
        seen: [Tq, Tk] bool, true where a query may read a key; 0 comes out where it may read none.
        soft_cap: scores become cap * tanh(score / cap).

    Returns:
        [Tq, Hq, D] in q's type.
    """
    tokens, heads, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(exact).transpose(0, 1) for x in (k, v))  # [Hkv, Tk, D]
    block = max(1, SCORES // (heads * seen.shape[1]))
    out = torch.empty_like(q)
    for start in range(0, tokens, block):
        rows = slice(start, start + block)
        queries = (q[rows].to(exact) * scale).unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # [Hkv, G, t, D]
        scores = capped(torch.bmm(queries.flatten(1, 2), k.transpose(1, 2)), soft_cap)
        by_query = scores.unflatten(1, queries.shape[1:3])  # [Hkv, G, t, Tk]
        by_query.masked_fill_(~seen[rows], -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num_(0.0)  # NaN: nothing was seen
        found = torch.bmm(weights, v).unflatten(1, queries.shape[1:3])  # [Hkv, G, t, D]
        out[rows] = found.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def capped(scores: Tensor, soft_cap: float | None) -> Tensor:
    """cap * tanh(score / cap), in place."""
    return scores if soft_cap is None else scores.div_(soft_cap).tanh_().mul_(soft_cap)


def padded_decode(spec: AttentionSpec, q: Tensor, kv: KV, blocks: Tensor, mask: Tensor) -> Tensor:
    """One query a sequence, all sequences gathered to one length: few operations of fixed shapes, for compilers.

    Args:
        spec: the layer's shape.
        q: [B, Hq, D].
        kv: the layer's cache.
        blocks: [B, n] int64.
        mask: [B, 1, 1, n * P] bool, true where the token may be read.

    Returns:
        [B, Hq * D].
    """
    there = mask.transpose(1, 3)  # [B, n * P, 1, 1]

    def side(stored: Tensor, factor: Tensor | None) -> Tensor:
        found = _indexable(stored)[blocks].view(stored.dtype)  # [B, n, P, Hkv, D]
        if factor is not None:
            factors = factor if factor.numel() == 1 else factor[blocks]
            found = (found.float() * factors.unsqueeze(-1)).to(q.dtype)
        return found.flatten(1, 2).where(there, 0).transpose(1, 2)  # [B, Hkv, n * P, D]

    k_scale, v_scale = scales_of(kv)
    keys, values = side(kv[0], k_scale), side(kv[1], v_scale)
    queries = q.unflatten(1, (spec.num_kv_heads, -1))  # [B, Hkv, G, D]
    if spec.soft_cap is None:
        out = sdpa(queries, keys, values, attn_mask=mask, scale=spec.scale)
    else:
        scores = capped(queries.float() @ keys.float().transpose(2, 3) * spec.scale, spec.soft_cap)
        out = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values.float()).to(q.dtype)
    return out.reshape(len(q), -1)
