"""Merging the partial results of one query tile, whose keys were split over several programs (Flash-Decoding).

A partial result is softmax(scores of its keys) . V, normalised, with the log2 of its sum of exponentials. The whole is
their mean, weighted with 2^log2sum: exact, whatever the split. Either a kernel of its own does it, one program a few
rows, or the program that arrives last at the tile's counter, in the launch that made the partial results.

Bytes: splits * rows * (4 D + 4) in, rows * D * itemsize out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from module0_profiling.triton_compile import TritonBuild
from phase3_paged_attention.work_list import Work

ROWS_ON_THEIR_WAY = 16  # to a program of the kernel


@triton.jit
def merged(  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    partial_ptr, log2sum_ptr, first_slot, splits, row, real,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Whole results of some rows, [ROWS, WIDTH] float32; 0 where no split saw a key.

    Pointers are at the KV head, slots STRIDE rows apart. The copies of STAGES - 1 splits are on their way, in shared
    memory: as tensors they would all be in registers, which the kernel that merges in its own launch can't spare. Loads
    go past L1 where the copies can, else the caller's atomic has emptied it: partial results are other programs' work.
    """
    dim = tl.arange(0, WIDTH)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in tl.range(0, splits, num_stages=STAGES):
        at = (first_slot + split).to(tl.int64) * STRIDE + row
        log2sum = tl.load(log2sum_ptr + at, mask=real, other=float("-inf"), cache_modifier=".cg")
        partial = tl.load(
            partial_ptr + at[:, None] * D + dim[None, :],
            mask=real[:, None] & (dim < D)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [ROWS, WIDTH]
        higher = tl.maximum(top, log2sum)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is no number
        weight, fade = tl.exp2(log2sum - base), tl.exp2(top - base)
        total = total * fade + weight
        sums = sums * fade[:, None] + partial * weight[:, None]
        top = higher
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, log2sum_ptr, out_ptr, merges_ptr, query_start_ptr,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program merges ROWS rows of one tile and KV head."""
    merges_ptr += tl.program_id(0) * 4
    sequence = tl.load(merges_ptr)
    if sequence < 0:
        return
    first_token, first_slot, splits = tl.load(merges_ptr + 1), tl.load(merges_ptr + 2), tl.load(merges_ptr + 3)
    start, stop = tl.load(query_start_ptr + sequence), tl.load(query_start_ptr + sequence + 1)
    G: tl.constexpr = HQ // HKV
    kv_head = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    token = start + first_token + row // G
    real = (row < TOKENS * G) & (token < stop)
    result = merged(
        partial_ptr + kv_head * BLOCK_M * D, log2sum_ptr + kv_head * BLOCK_M,
        first_slot, splits, row, real, HKV * BLOCK_M, D, WIDTH, ROWS, STAGES,
    )  # fmt: skip
    dim = tl.arange(0, WIDTH)
    at = (token.to(tl.int64) * HQ + kv_head * G + row % G) * D
    tl.store(
        out_ptr + at[:, None] + dim[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (dim < D)[None, :],
    )


def merge(out: Tensor, partial: Tensor, log2sum: Tensor, work: Work, query_start: Tensor, heads: int) -> None:
    """Merge what the splits of `work` left, into their rows of `out`.

    Args:
        out: [T, Hq * D].
        partial: [slots, Hkv, BLOCK_M, D] float32, normalised within each split; rows that are no token are not read.
        log2sum: [slots, Hkv, BLOCK_M] float32; -inf where the split saw no key.
        work: which slots belong together.
        query_start: [B+1] int32.
        heads: Hq.
    """
    _, kv_heads, block_m, dim = partial.shape
    rows = work.tokens * heads // kv_heads
    block = rows_of(block_m)
    merge_kernel[work.merges.shape[0], kv_heads, triton.cdiv(rows, block)](
        partial, log2sum, out, work.merges, query_start,
        HQ=heads, HKV=kv_heads, D=dim, WIDTH=triton.next_power_of_2(dim), TOKENS=work.tokens,
        BLOCK_M=block_m, ROWS=block, STAGES=ROWS_ON_THEIR_WAY // block, num_warps=2,
    )  # fmt: skip


def rows_of(block_m: int) -> int:
    """Rows of a program: one where a tile is a decode, a few where it has many rows and so enough programs."""
    return 1 if block_m <= 16 else 4


def build(heads: int, kv_heads: int, dim: int, tokens: int, block_m: int) -> TritonBuild:
    """For partial results of one query tile, out in bfloat16."""
    pointers = {"partial_ptr": "*fp32", "log2sum_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {
        "HQ": heads, "HKV": kv_heads, "D": dim, "WIDTH": int(triton.next_power_of_2(dim)), "TOKENS": tokens,
        "BLOCK_M": block_m, "ROWS": rows_of(block_m), "STAGES": ROWS_ON_THEIR_WAY // rows_of(block_m),
    }  # fmt: skip
    signature = {**pointers, "merges_ptr": "*i32", "query_start_ptr": "*i32"}
    return TritonBuild(f"merge {block_m}x{dim}", merge_kernel, signature, constants, tuple(signature), 2, 1)
