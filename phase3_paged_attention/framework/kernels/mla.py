"""Attention of absorbed queries on a paged cache of latents: a program for each new token and head.

A layer of V3 (H = 128, L = 512, R = 64) has 1,152 bytes a cached token in bfloat16. Here every one of its 128 heads
loads them, the latent even twice: 128 x 2,176 bytes. Right, and 240 times the bytes that there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase3_paged_attention.kernels.latent_tiles import Cut
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.work_list import Work

if TYPE_CHECKING:
    from phase3_paged_attention.kernels.paged import Tables

BLOCK_N = 16


@triton.jit
def latents_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    q_ptr, cache_ptr, tables_ptr, query_start_ptr, seq_lens_ptr, visible_ptr, items_ptr, out_ptr,
    scale, tokens, q_token, q_head, table_stride,
    H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, LW: tl.constexpr, RW: tl.constexpr, P: tl.constexpr,
    BN: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """One program: one new token of an item, one head. LW and RW are powers of two that hold L and R."""
    head, index = tl.program_id(0) % H, tl.program_id(0) // H
    item = items_ptr + index // tokens * 6
    sequence = tl.load(item)
    if sequence < 0:
        return
    start, stop = tl.load(query_start_ptr + sequence), tl.load(query_start_ptr + sequence + 1)
    token = tl.load(item + 1) + index % tokens
    if start + token >= stop:
        return
    past = tl.load(seq_lens_ptr + sequence) - (stop - start)
    key, dim, turn = tl.arange(0, BN), tl.arange(0, LW), tl.arange(0, RW)
    # TASK 3.5: all heads read the same entries. Make heads the rows of a tile, with several new tokens where heads are
    # few, and multiply with tl.dot: what is loaded once serves every row.
    row = (start + token).to(tl.int64)
    q = tl.load(q_ptr + row * q_token + head * q_head + dim, mask=dim < L, other=0.0).to(tl.float32)
    q_turned = tl.load(q_ptr + row * q_token + head * q_head + L + turn, mask=turn < R, other=0.0).to(tl.float32)
    bits = tl.load(visible_ptr + start + token) if VISIBLE else -1
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((LW,), tl.float32)
    # TASK 3.5: an item says which part of the sequence to read, and where its partial result goes. Here one program
    # reads all of it: a long sequence keeps H programs of the GPU busy, and the others wait.
    for low in range(0, past + token + 1, BN):
        position = low + key
        inside = position < past + token + 1
        block = tl.load(tables_ptr + sequence.to(tl.int64) * table_stride + position // P, mask=inside, other=0)
        entry = cache_ptr + (block.to(tl.int64) * P + position % P)[:, None] * (L + R)
        # TASK 3.5: the latent is key and value, and is loaded as both. Keep the tile.
        c = tl.load(entry + dim[None, :], mask=inside[:, None] & (dim < L)[None, :], other=0.0).to(tl.float32)
        k = tl.load(entry + L + turn[None, :], mask=inside[:, None] & (turn < R)[None, :], other=0.0).to(tl.float32)
        scores = (tl.sum(c * q[None, :], 1) + tl.sum(k * q_turned[None, :], 1)) * scale
        if VISIBLE:
            place = position - past
            bit = (bits >> tl.minimum(tl.maximum(place, 0), 63).to(tl.int64)) & 1
            inside = inside & ((place < 0) | (bits == -1) | ((bit != 0) & (place < 64)))
        scores = tl.where(inside, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, fade = tl.exp2(scores - base), tl.exp2(top - base)
        v = tl.load(entry + dim[None, :], mask=inside[:, None] & (dim < L)[None, :], other=0.0).to(tl.float32)
        sums = sums * fade + tl.sum(v * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        top = higher
    result = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (row * H + head) * L + dim, result.to(out_ptr.dtype.element_ty), mask=dim < L)


def why_not(latent: int, rope: int) -> list[str]:
    """Reasons why no tile holds such entries: here there is none."""
    return []


def cut_for(heads: int, queries: int, dtype: torch.dtype, packed: bool, device: torch.device) -> Cut:
    """How to cut sequences that have so many new tokens; a tile is one token, and nobody splits."""
    return Cut(1, 1, heads, BLOCK_N, heads)


def attend_latents(
    q: Tensor,
    cache: Tensor,
    tables: Tables,
    work: Work,
    *,
    scale: float,
    latent: int,
    rope: int,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens to the latents of their sequences, their own included; sums of latents, before W_UV.

    Args:
        q: [T, H, L + R] with W_UK absorbed, the last R numbers turned; float32, float16 or bfloat16, any strides but
            the last.
        cache: [blocks, P, 1, L + R] of q's type, or packed, [blocks, P, 1, bytes] uint8 as `PackedLatents(L, R, q's
            type)` makes them; contiguous.
        tables: where sequences and their blocks are.
        work: from `plan_work`, cut as `cut_for` says.
        scale: of the scores, (P + R)^-0.5 and not (L + R)^-0.5.
        latent, rope: L and R.
        out: [T, H, L], contiguous, of q's type, where to write; only rows of sequences in `work` are written.

    Returns:
        [T, H, L] of q's type.

    Raises:
        ValueError: entries of another size than L and R say, or a cache that is not contiguous.
    """
    (tokens, heads, _), (_, page, _, size) = q.shape, cache.shape
    packed = cache.dtype == torch.uint8
    entry = PackedLatents(latent, rope, q.dtype).entry_bytes if packed else latent + rope
    if size != entry or not cache.is_contiguous():
        raise ValueError(
            f"the cache has entries of {size} with strides {cache.stride()}: {entry}, contiguous, are read"
        )
    if packed:
        # TASK 3.5: this unpacks the whole cache to read a part of it. The kernel can do that in registers.
        cache = PackedLatents(latent, rope, q.dtype).unpack(cache)
    out = q.new_empty(tokens, heads, latent) if out is None else out
    programs = work.items.shape[0] * work.tokens * heads
    if programs:
        latents_kernel[(programs,)](
            q, cache, tables.block_tables, tables.query_start, tables.seq_lens, tables.visible, work.items, out,
            scale * math.log2(math.e), work.tokens, *q.stride()[:2], tables.block_tables.stride(0),
            H=heads, L=latent, R=rope, LW=triton.next_power_of_2(latent), RW=triton.next_power_of_2(rope), P=page,
            BN=BLOCK_N, VISIBLE=tables.visible is not None,
        )  # fmt: skip
    return out
