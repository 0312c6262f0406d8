"""Attention where the cache lies: one kernel family for decodes, prompts, chunks of prompts, prefixes and trees.

    bytes  4 D a cached token and KV head (2 D in FP8), once for each tile of query tokens; q and out once
    FLOPs  4 D a cached token and query head: G FLOPs a byte for a decode, TOKENS * G for a prompt

Here is the host's side: what is launched, with which tile. `kernels.paged_triton` is the device's, `kernels.merge` puts
split sequences together, `kernels.reference.attend` is the twin in torch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase3_paged_attention.kernels.merge import merge
from phase3_paged_attention.kernels.paged_triton import paged_kernel
from phase3_paged_attention.kernels.tiles import DECODE_ROWS, Tile, rows_of, tile_of
from phase3_paged_attention.work_list import Work

LOG2E = math.log2(math.e)
FEW_MERGES, FEW_SPLITS = 256, 8  # up to here the last program of a tile merges it
FORMATS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}  # how the cache keeps numbers; else as q
MOST_DIM = 256
PLAIN, PER_TENSOR, PER_TOKEN = 0, 1, 2  # scales of the cache
KV = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


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
    """Attention of new tokens to the cache that holds them; nothing waits for the device, so a CUDA graph can hold it.

    Args:
        q: [T, Hq, D] of float32, float16 or bfloat16, any strides but the last; D up to 256.
        kv: keys and values, each [blocks, P, Hkv, D] of q's type, strides alike; or float8_e4m3fn or float8_e5m2 with
            their scales, float32, [1] or [blocks, P, Hkv]: a number is what is stored times its scale.
        tables: where sequences and their blocks are.
        work: from `plan_work`, for this window.
        scale: of the scores, above 0.
        window: tokens that a query sees, itself included.
        soft_cap: scores become cap * tanh(score / cap).
        out: [T, Hq, D], contiguous, of q's type, where to write; only rows of sequences in `work` are written.

    Returns:
        [T, Hq * D] of q's type.

    Raises:
        ValueError: keys and values lie differently.
    """
    return launch(q, kv, tables, work, scale=scale, window=window, soft_cap=soft_cap, out=out)


def launch(
    q: Tensor,
    kv: KV,
    tables: Tables,
    work: Work,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    last_block: bool | None = None,
) -> Tensor:
    """As `attend`, for those who try what it chooses.

    Args:
        q, kv, tables, work, scale, window, soft_cap, out: see `attend`.
        tile: other than the table's.
        last_block: whether the last program of a tile merges its splits, or a second launch; None: by their number.
    """
    keys, values, *scales = kv
    (tokens, heads, dim), (_, page, kv_heads, _) = q.shape, keys.shape
    if keys.stride() != values.stride():
        raise ValueError(f"keys and values must lie alike: strides are {keys.stride()} and {values.stride()}")
    block_m = block_m_of(work.tokens, heads // kv_heads)
    tile = tile or tile_of(_capability(q.device), dim, block_m, keys.element_size(), q.element_size())
    split = work.slots > 0
    if last_block is None:
        tiles = min(
            work.merges.shape[0], tables.seq_lens.shape[0]
        )  # of a captured launch, lists are longer than needed
        last_block = block_m <= DECODE_ROWS and work.slots <= FEW_SPLITS * tiles
    last_block = last_block and 0 < work.merges.shape[0] <= FEW_MERGES
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device) if out is None else out
    slots = (work.slots, kv_heads, block_m)
    partial = q.new_empty((*slots, dim) if split else 0, dtype=torch.float32)
    log2sum = q.new_empty(slots if split else 0, dtype=torch.float32)
    stored = FORMATS.get(keys.dtype, 0)
    if stored:
        keys, values = keys.view(torch.uint16), values.view(torch.uint16)
    k_scale, v_scale = scales or (None, None)
    kind = PLAIN if k_scale is None else PER_TENSOR if k_scale.numel() == 1 else PER_TOKEN
    scale_strides = (0, 0, 0) if k_scale is None or kind == PER_TENSOR else k_scale.stride()
    cap = 0.0 if soft_cap is None else soft_cap
    items = work.items.shape[0]
    if items == 0:
        return out.flatten(1)
    paged_kernel[(items * kv_heads,)](
        q, keys, values, k_scale, v_scale, out, partial, log2sum,
        work.items, work.merges, work.counters, tables.query_start, tables.seq_lens, tables.block_tables,
        tables.visible, scale * (2 * LOG2E / cap if cap else LOG2E), cap * LOG2E, window or 0, work.merges.shape[0],
        *q.stride()[:2], *keys.stride()[:3], *scale_strides,
        tables.block_tables.stride(0),
        HQ=heads, HKV=kv_heads, D=dim, WIDTH=width_of(dim, stored), P=page,
        FORMAT=stored, SCALES=kind, CAPPED=cap > 0, WINDOWED=work.tokens > 1 and window is not None,
        VISIBLE=tables.visible is not None,
        SPLIT=split, LAST_BLOCK=last_block, MERGES=FEW_MERGES, WIDE=_is_wide(keys),
        TOKENS=work.tokens, BLOCK_M=block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split and not last_block:
        merge(out, partial, log2sum, work, tables.query_start, heads)
    return out.flatten(1)


def block_m_of(tokens: int, group: int) -> int:
    """Rows of a tile: `tokens` with their `group` heads, as a power of two that a tensor core takes."""
    return max(16, int(triton.next_power_of_2(tokens * group)))


def width_of(dim: int, stored: int) -> int:
    """Columns of a tile that holds D numbers: a power of two, and 16 at least in each product of a tensor core."""
    return max(32 if stored else 16, int(triton.next_power_of_2(dim)))


def _is_wide(side: Tensor) -> bool:
    """Whether 32 bits are too few to count the numbers of a cache from its first."""
    return sum((n - 1) * s for n, s in zip(side.shape, side.stride(), strict=True)) >= 2**31


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def why_not(spec: AttentionSpec, device: torch.device) -> list[str]:
    """Reasons why the kernel can't do what this layer wants; empty: it can."""
    reasons = []
    if spec.head_dim > MOST_DIM:
        reasons.append(f"its tiles hold heads of up to {MOST_DIM} numbers, these have {spec.head_dim}")
    if spec.head_dim % 2 and spec.kv_cache_dtype != "auto":
        reasons.append(f"it reads FP8 in pairs, heads have {spec.head_dim} numbers")
    if spec.num_heads % spec.num_kv_heads:
        reasons.append(f"{spec.num_heads} query heads can't share {spec.num_kv_heads} key heads evenly")
    if spec.dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"it has no tile for queries in {str(spec.dtype).removeprefix('torch.')}")
    if spec.scale <= 0:
        reasons.append(f"it takes the largest score before scaling it by {spec.scale}")
    if device.type != "cuda" and spec.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter is silently wrong for bfloat16")
    return reasons


def tokens_of(spec: AttentionSpec, device: torch.device, query_len: int) -> int:
    """New tokens of a tile for a sequence with this many: few, large tiles; a decode's is small."""
    group = spec.num_heads // spec.num_kv_heads
    if query_len == 1:
        return 1
    return max(1, rows_of(group, query_len, spec.head_dim, _sizes(spec)[1]) // group)


def block_n_of(spec: AttentionSpec, device: torch.device, tokens: int) -> int:
    """Cached tokens that a program with such a tile reads at a time."""
    return _tile(spec, device, tokens).block_n


def programs_of(spec: AttentionSpec, device: torch.device, tokens: int) -> int:
    """Programs with such a tile that the device runs at once."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return int(sms) * _tile(spec, device, tokens).blocks


def _tile(spec: AttentionSpec, device: torch.device, tokens: int) -> Tile:
    block_m = block_m_of(tokens, spec.num_heads // spec.num_kv_heads)
    return tile_of(_capability(device), spec.head_dim, block_m, *_sizes(spec))


def _sizes(spec: AttentionSpec) -> tuple[int, int]:
    """Bytes of a number in the cache and in q."""
    query = (spec.dtype or torch.bfloat16).itemsize
    return query if spec.kv_cache_dtype == "auto" else 1, query
