"""Attention of absorbed queries on a paged cache of latents: decodes, and a few new tokens of a sequence.

A layer of V3 (H = 128, L = 512, R = 64) reads 1,152 bytes a cached token in bfloat16 and 656 in FP8, for 2 (2 L + R) H
= 278,528 FLOPs. All heads read the same rows, so a program holds as many heads as its registers take. The versions:

    framework   a program for each new token and head: rows are loaded H times over, their latents twice
    tile        new tokens x heads are rows of one tile: what is loaded serves all of them, as key and as value
    split       a long sequence is dealt out to many programs by `Work`; `merge` joins their results. In a launch of its
                own: a tile leaves 128 KB a split, too much for the last program to read alone
    packed      entries of `latent_format` become numbers of q's type in registers

The kernel is in `latents_triton`, its tiles are in `latent_tiles`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from phase3_paged_attention.kernels.latent_tiles import (
    WIDEST_LATENT,
    WIDEST_ROPE,
    Cut,
    LatentTile,
    fitting,
    tiles_of,
)
from phase3_paged_attention.kernels.latents_triton import latents_kernel, sizes
from phase3_paged_attention.kernels.merge import merge
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.work_list import Work

if TYPE_CHECKING:
    from phase3_paged_attention.kernels.paged import Tables

CPU_PROGRAMS = 8  # as if the interpreter ran so many at once: it splits like a small GPU


def why_not(latent: int, rope: int) -> list[str]:
    """Reasons why no tile holds such entries; empty: one does."""
    if latent <= WIDEST_LATENT and rope <= WIDEST_ROPE:
        return []
    return [f"its tiles hold latents of {WIDEST_LATENT} + {WIDEST_ROPE}, not {latent} + {rope}"]


@functools.lru_cache  # asked for every sequence of every step
def cut_for(heads: int, queries: int, dtype: torch.dtype, packed: bool, device: torch.device) -> Cut:
    """How to cut sequences that have so many new tokens. Few heads leave rows of a tile for several tokens."""
    tiles = tiles_of(_capability(device), packed, dtype.itemsize)
    most = tiles[-1].rows
    tokens = min(int(triton.next_power_of_2(queries)), max(1, most // heads))
    tokens = 1 << tokens.bit_length() - 1  # few distinct ones: each is compiled
    tile, group = fitting(heads, tokens, tiles)
    return Cut(tokens, group, heads // group, tile.keys, _multiprocessors(device) * tile.blocks)


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
    return launch(q, cache, tables, work, scale=scale, latent=latent, rope=rope, out=out)


def launch(
    q: Tensor,
    cache: Tensor,
    tables: Tables,
    work: Work,
    *,
    scale: float,
    latent: int,
    rope: int,
    out: Tensor | None = None,
    tiles: tuple[LatentTile, ...] | None = None,
) -> Tensor:
    """As `attend_latents`, with `tiles` other than the table's if they are given."""
    (tokens, heads, _), (_, page, _, size) = q.shape, cache.shape
    packed = cache.dtype == torch.uint8
    entry = PackedLatents(latent, rope, q.dtype).entry_bytes if packed else latent + rope
    if size != entry or not cache.is_contiguous():
        raise ValueError(
            f"the cache has entries of {size} with strides {cache.stride()}: {entry}, contiguous, are read"
        )
    out = q.new_empty(tokens, heads, latent) if out is None else out
    items = work.items.shape[0]
    if items == 0:
        return out
    tile, group = fitting(heads, work.tokens, tiles or tiles_of(_capability(q.device), packed, q.dtype.itemsize))
    head_tiles = heads // group
    partial = q.new_empty((work.slots, head_tiles, tile.rows, latent), dtype=torch.float32)
    log2sum = q.new_empty((work.slots, head_tiles, tile.rows), dtype=torch.float32)
    scales = cache.view(torch.float32) if packed else cache
    turned = cache.view(PackedLatents(latent, rope, q.dtype).rope_dtype) if packed else cache
    latents_kernel[(items * head_tiles,)](
        q, cache, scales, turned, tables.block_tables, tables.query_start, tables.seq_lens, tables.visible, work.items,
        out, partial, log2sum, scale * math.log2(math.e), *q.stride()[:2], tables.block_tables.stride(0),
        **sizes(heads, latent, rope, page, work.tokens, group, tile),
        PACKED=packed, HARDWARE=tile.hardware, VISIBLE=tables.visible is not None, WIDE=cache.numel() >= 2**31,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if work.slots:
        merge(out, partial, log2sum, work, tables.query_start, heads)
    return out


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
