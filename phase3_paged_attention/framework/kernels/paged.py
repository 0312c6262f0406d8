"""Attention where the cache lies, as one would first write it: a program a query token and query head.

Nothing is gathered, which is the point of the phase. A program goes through its sequence's pages twice, first for the
largest score, then for the sums, so keys are read twice; and G query heads read the same keys and values, each alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase3_paged_attention.work_list import Work

KV = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]
PLAIN, PER_TENSOR, PER_TOKEN = 0, 1, 2  # scales of the cache
TILE = 16  # new tokens that an item of a long prompt has


@dataclass(frozen=True)
class Tables:
    """What a step's launches read, on the device.

    Attributes:
        query_start: [B+1] int32, sequence b owns rows query_start[b]..query_start[b+1]-1 of q.
        seq_lens: [B] int32, tokens with those of this step, which are the last ones and in the cache already.
        block_tables: [B, n] int32, any row stride.
        visible: [T] int64, bit j: the token may see the j-th new token of its sequence, j < 64; -1: plain causal.
            Causality by row holds besides. None: -1 for all.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    visible: Tensor | None = None


@triton.jit
def _page_of(  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    side_ptr, scale_ptr, table_ptr, page, length, block_stride, place_stride, scale_block, scale_place,
    D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Keys or values of one page, [PAGE, WIDTH] float32; 0 where no token is."""
    place, dim = tl.arange(0, PAGE), tl.arange(0, WIDTH)
    inside = (place < P) & (page * P + place < length)
    block = tl.load(table_ptr + page).to(tl.int64)
    at = (block * block_stride + place * place_stride)[:, None] + dim[None, :]
    found = tl.load(side_ptr + at, mask=inside[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
    if SCALES == 1:
        found *= tl.load(scale_ptr)
    elif SCALES == 2:
        found *= tl.load(scale_ptr + block * scale_block + place * scale_place, mask=inside, other=0.0)[:, None]
    return found


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    q, k, page, position, old, bits, scale, cap, window,
    P: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """Scores of a page [PAGE], -inf for what the token at `position` may not see."""
    place = tl.arange(0, PAGE)
    token = page * P + place
    scores = tl.sum(q[None, :] * k, 1) * scale
    if CAPPED:
        scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)  # cap * tanh(scores / cap)
    seen = (place < P) & (token <= position)
    if WINDOWED:
        seen &= token > position - window
    if VISIBLE:
        j = token - old  # of this token among the new ones
        bit = (bits >> tl.minimum(tl.maximum(j, 0), 63).to(tl.int64)) & 1
        seen &= (j < 0) | (bits == -1) | ((bit != 0) & (j < 64))
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def paged_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, out_ptr,
    items_ptr, query_start_ptr, seq_lens_ptr, tables_ptr, visible_ptr, scale, cap, window, tokens,
    q_token, q_head, block_stride, place_stride, head_stride, scale_block, scale_place, scale_head, table_stride,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    SCALES: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """One program: one of the `tokens` of an item, one query head. WIDTH, PAGE: powers of two that hold D and P."""
    head, token = tl.program_id(0) % HQ, tl.program_id(0) // HQ
    item_ptr = items_ptr + token // tokens * 6
    sequence = tl.load(item_ptr)
    if sequence < 0:
        return
    start = tl.load(query_start_ptr + sequence)
    new = tl.load(query_start_ptr + sequence + 1) - start
    first = tl.load(item_ptr + 1)
    index = first + token % tokens  # of the token among the sequence's new ones
    if index >= new:
        return
    length = tl.load(seq_lens_ptr + sequence)
    old = length - new
    # TASK 3.2: a program reads all that its token sees, however long that is. So an item that is a later part of its
    # tile has nothing left to do.
    seen_first = tl.maximum(old + first + 1 - window, 0) if WINDOWED else 0
    if tl.load(item_ptr + 2) > seen_first:
        return
    position = old + index
    row = (start + index).to(tl.int64)
    bits = tl.load(visible_ptr + row) if VISIBLE else row
    dim = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + row * q_token + head * q_head + dim, mask=dim < D, other=0.0).to(tl.float32)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    # TASK 3.1: the G heads of this KV head ask for the same keys and values, in G programs, one number after the other.
    # Count the bytes; and look up how many rows the smallest product of a tensor core has.
    kv_head = (head // (HQ // HKV)).to(tl.int64)
    keys_ptr += kv_head * head_stride
    values_ptr += kv_head * head_stride
    if SCALES == 2:
        k_scale_ptr += kv_head * scale_head
        v_scale_ptr += kv_head * scale_head

    # TASK 3.1: keys are read twice, since a weight needs the largest score. Does it? Besides, a page at a time is
    # little to have on its way, and nobody says that a tile must be one. And what lies before the window is read too.
    top = float("-inf")
    for page in range(0, position // P + 1):
        k = _page_of(keys_ptr, k_scale_ptr, table_ptr, page, length, block_stride, place_stride,
                     scale_block, scale_place, D, WIDTH, P, PAGE, SCALES)  # fmt: skip
        scores = _scores(q, k, page, position, old, bits, scale, cap, window, P, PAGE, CAPPED, WINDOWED, VISIBLE)
        top = tl.maximum(top, tl.max(scores, 0))
    base = tl.where(top == float("-inf"), 0.0, top)  # of a token that sees nothing: -inf - -inf is no number
    total = 0.0
    sums = tl.zeros((WIDTH,), tl.float32)
    for page in range(0, position // P + 1):
        k = _page_of(keys_ptr, k_scale_ptr, table_ptr, page, length, block_stride, place_stride,
                     scale_block, scale_place, D, WIDTH, P, PAGE, SCALES)  # fmt: skip
        v = _page_of(values_ptr, v_scale_ptr, table_ptr, page, length, block_stride, place_stride,
                     scale_block, scale_place, D, WIDTH, P, PAGE, SCALES)  # fmt: skip
        scores = _scores(q, k, page, position, old, bits, scale, cap, window, P, PAGE, CAPPED, WINDOWED, VISIBLE)
        weights = tl.exp(scores - base)
        total += tl.sum(weights, 0)
        sums += tl.sum(weights[:, None] * v, 0)
    result = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (row * HQ + head) * D + dim, result.to(out_ptr.dtype.element_ty), mask=dim < D)


def attend(
    q: Tensor,
    kv: KV,
    tables: Tables,
    work: Work,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens to the cache that holds them.

    Args:
        q: [T, Hq, D] of float32, float16 or bfloat16, any strides but the last.
        kv: keys and values, each [blocks, P, Hkv, D] of q's type, strides alike; or float8_e4m3fn or float8_e5m2 with
            their scales, float32, [1] or [blocks, P, Hkv]: a number is what is stored times its scale.
        tables: where sequences and their blocks are.
        work: from `plan_work`, for this window.
        scale: of the scores.
        window: tokens that a query sees, itself included.
        soft_cap: scores become cap * tanh(score / cap).
        out: [T, Hq, D], contiguous, of q's type, where to write; only rows of sequences in `work` are written.

    Returns:
        [T, Hq * D] of q's type.

    Raises:
        ValueError: keys and values lie differently.
    """
    keys, values, *scales = kv
    (tokens, heads, dim), (_, page, kv_heads, _) = q.shape, keys.shape
    if keys.stride() != values.stride():
        raise ValueError(f"keys and values must lie alike: strides are {keys.stride()} and {values.stride()}")
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device) if out is None else out
    programs = work.items.shape[0] * work.tokens * heads
    if programs == 0:
        return out.flatten(1)
    k_scale, v_scale = scales or (None, None)
    per_token = k_scale is not None and k_scale.dim() > 1
    strides = k_scale.stride() if k_scale is not None and per_token else (0, 0, 0)
    paged_kernel[(programs,)](
        q, keys, values, k_scale, v_scale, out,
        work.items, tables.query_start, tables.seq_lens, tables.block_tables, tables.visible,
        scale, soft_cap or 0.0, window or 0, work.tokens,
        *q.stride()[:2], *keys.stride()[:3], *strides, tables.block_tables.stride(0),
        HQ=heads, HKV=kv_heads, D=dim, WIDTH=triton.next_power_of_2(dim), P=page, PAGE=triton.next_power_of_2(page),
        SCALES=PER_TOKEN if per_token else PLAIN if k_scale is None else PER_TENSOR,
        CAPPED=soft_cap is not None, WINDOWED=window is not None, VISIBLE=tables.visible is not None,
    )  # fmt: skip
    return out.flatten(1)


def why_not(spec: AttentionSpec, device: torch.device) -> list[str]:
    """Reasons why this kernel can't serve a layer."""
    older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    if older and spec.kv_cache_dtype != "auto":
        return [f"it reads no {spec.kv_cache_dtype} cache on this GPU: Triton converts FP8 from sm_89 on"]
    return []


def tokens_of(spec: AttentionSpec, device: torch.device, query_len: int) -> int:
    """New tokens of a tile, for a sequence that has so many. Here a tile shares nothing but its item."""
    return 1 if query_len == 1 else TILE


def block_n_of(spec: AttentionSpec, device: torch.device, tokens: int) -> int:
    """Cached tokens that a program reads at a time, for tiles of so many new tokens."""
    return 16


def programs_of(spec: AttentionSpec, device: torch.device, tokens: int) -> int:
    """Programs with such tiles that the device runs at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
