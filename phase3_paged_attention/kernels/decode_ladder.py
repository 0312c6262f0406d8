"""Decode on a paged cache as a ladder: one new token a sequence, five kernels, each with one idea more.

For a sequence of S tokens, 2 S Hkv D numbers of keys and values must be read once: the floor. Its 4 S Hq D FLOPs
are G a byte in 16 bits, so every rung waits for memory, and what it asks of it decides (tensor by tensor: `costs.py`).

    rung     program                asks for K and V   adds
    naive    sequence, query head   1.5 G times        page by page, twice: the maximum of the scores, then the sums
    online   sequence, query head   G times            one pass: sums fade as the maximum grows; exp2, scale folded in
    tiled    sequence, query head   G times            tiles of any length, so that more is on its way at once
    packed   sequence, KV head      once               G heads that share keys are rows of one product; cp.async
    split    the same, a KV range   once               few long sequences fill a GPU; a second kernel merges

Where G programs ask for the same bytes at one time, the L2 answers most of them: less than G times comes from memory.

Two exhibits are `packed` with one table entry loaded a page instead of a token, reshaped to the BN tokens of the tile:
`page_rows` reshapes the row numbers, `page_gather` the addresses of the whole tile. The latter hides from the compiler
that neighbours lie side by side: loads of 2 bytes instead of 16, and no copies in the background.

Sources: online softmax, arXiv 1805.02867; paged attention, arXiv 2309.06180; split, Flash-Decoding (Dao et al., 2023).
The interpreter (TRITON_INTERPRET=1) runs this in float32 and float16; for bfloat16 it is silently wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from module0_profiling.triton_compile import TritonBuild

RUNGS = ("naive", "online", "tiled", "packed", "split")
EXHIBITS = ("page_rows", "page_gather")  # of `packed`, to be compiled; BN is a multiple of P, both powers of two
ROWS = 16  # of the smallest tile that a tensor core multiplies
PROGRAMS = 264  # that keep a GPU of 132 SMs busy
MAX_SPLITS = 64  # whose partial results the merge holds at once


@triton.jit
def _rows(side_ptr, slots, inside, ROW: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """[N, WIDTH] of one head at `slots` [N] int64; what is not `inside` is 0, also where the cache holds NaN."""
    dim = tl.arange(0, WIDTH)[None, :]
    wanted = inside[:, None]
    if WIDTH != D:
        wanted = wanted & (dim < D)
    return tl.load(side_ptr + (slots * ROW)[:, None] + dim, mask=wanted, other=0.0)


@triton.jit
def _slots(table_ptr, token, inside, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where tokens [N] lie in the cache, int64. Each reads a table entry, mostly the one that its neighbours read."""
    block = tl.load(table_ptr + token // P, mask=inside, other=0)
    return block.to(tl.int64) * P + token % P


@triton.jit
def _fade(scores, top, total):  # type: ignore[no-untyped-def]
    """Weights of one more tile of scores [N], by how much earlier sums fade, the new maximum and total."""
    higher = tl.maximum(top, tl.max(scores, 0))
    weights = tl.exp2(scores - higher)
    fade = tl.exp2(top - higher)  # 0 in the first round: top is -inf, higher is not, since a tile has a token
    return weights, fade, higher, total * fade + tl.sum(weights, 0)


@triton.jit
def _fade_rows(scores, top, total):  # type: ignore[no-untyped-def]
    """`_fade` for scores [M, N], a row a head."""
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    return weights, fade, higher, total * fade + tl.sum(weights, 1)


@triton.jit
def naive_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, lengths_ptr, tables_ptr, out_ptr, table_row, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A program: one query head, twice through all pages. PAGE is the power of two that holds P, WIDTH that of D."""
    head, sequence = tl.program_id(0), tl.program_id(1)  # heads side by side: those of one KV head run together
    dim, place = tl.arange(0, WIDTH), tl.arange(0, PAGE)
    at = (sequence * HQ + head) * D + dim
    q = tl.load(q_ptr + at, mask=dim < D, other=0.0).to(tl.float32) * scale  # [WIDTH]
    length = tl.load(lengths_ptr + sequence)
    keys_ptr += head // (HQ // HKV) * D
    values_ptr += head // (HQ // HKV) * D
    tables_ptr += sequence * table_row
    top = float("-inf")
    for page in range(0, tl.cdiv(length, P)):
        slots = tl.load(tables_ptr + page).to(tl.int64) * P + place
        inside = (place < P) & (page * P + place < length)
        k = _rows(keys_ptr, slots, inside, HKV * D, D, WIDTH).to(tl.float32)  # [PAGE, WIDTH]
        top = tl.maximum(top, tl.max(tl.where(inside, tl.sum(q[None, :] * k, 1), float("-inf")), 0))
    total = 0.0
    sums = tl.zeros((WIDTH,), tl.float32)
    for page in range(0, tl.cdiv(length, P)):
        slots = tl.load(tables_ptr + page).to(tl.int64) * P + place
        inside = (place < P) & (page * P + place < length)
        k = _rows(keys_ptr, slots, inside, HKV * D, D, WIDTH).to(tl.float32)
        weights = tl.where(inside, tl.exp(tl.sum(q[None, :] * k, 1) - top), 0.0)  # [PAGE]
        v = _rows(values_ptr, slots, inside, HKV * D, D, WIDTH).to(tl.float32)
        total += tl.sum(weights, 0)
        sums += tl.sum(weights[:, None] * v, 0)
    tl.store(out_ptr + at, (sums / total).to(out_ptr.dtype.element_ty), mask=dim < D)


@triton.jit
def online_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, lengths_ptr, tables_ptr, out_ptr, table_row, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """As `naive`, in one pass; from here on `scale` has log2(e) in it."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    dim, place = tl.arange(0, WIDTH), tl.arange(0, PAGE)
    at = (sequence * HQ + head) * D + dim
    q = tl.load(q_ptr + at, mask=dim < D, other=0.0).to(tl.float32) * scale
    length = tl.load(lengths_ptr + sequence)
    keys_ptr += head // (HQ // HKV) * D
    values_ptr += head // (HQ // HKV) * D
    tables_ptr += sequence * table_row
    top, total = float("-inf"), 0.0
    sums = tl.zeros((WIDTH,), tl.float32)
    for page in range(0, tl.cdiv(length, P)):
        slots = tl.load(tables_ptr + page).to(tl.int64) * P + place
        inside = (place < P) & (page * P + place < length)
        k = _rows(keys_ptr, slots, inside, HKV * D, D, WIDTH).to(tl.float32)  # [PAGE, WIDTH]
        v = _rows(values_ptr, slots, inside, HKV * D, D, WIDTH).to(tl.float32)
        scores = tl.where(inside, tl.sum(q[None, :] * k, 1), float("-inf"))
        weights, fade, top, total = _fade(scores, top, total)
        sums = sums * fade + tl.sum(weights[:, None] * v, 0)
    tl.store(out_ptr + at, (sums / total).to(out_ptr.dtype.element_ty), mask=dim < D)


@triton.jit
def tiled_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, lengths_ptr, tables_ptr, out_ptr, table_row, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """As `online`, BN tokens at a time: each looks up its own page, so that a tile need not be one."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, WIDTH)
    at = (sequence * HQ + head) * D + dim
    q = tl.load(q_ptr + at, mask=dim < D, other=0.0).to(tl.float32) * scale
    length = tl.load(lengths_ptr + sequence)
    keys_ptr += head // (HQ // HKV) * D
    values_ptr += head // (HQ // HKV) * D
    tables_ptr += sequence * table_row
    top, total = float("-inf"), 0.0
    sums = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, length, BN):
        token = first + tl.arange(0, BN)
        inside = token < length
        slots = _slots(tables_ptr, token, inside, P)
        k = _rows(keys_ptr, slots, inside, HKV * D, D, WIDTH).to(tl.float32)  # [BN, WIDTH]
        v = _rows(values_ptr, slots, inside, HKV * D, D, WIDTH).to(tl.float32)
        scores = tl.where(inside, tl.sum(q[None, :] * k, 1), float("-inf"))
        weights, fade, top, total = _fade(scores, top, total)
        sums = sums * fade + tl.sum(weights[:, None] * v, 0)
    tl.store(out_ptr + at, (sums / total).to(out_ptr.dtype.element_ty), mask=dim < D)


@triton.jit
def packed_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, lengths_ptr, tables_ptr, out_ptr, table_row, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """A program: one KV head, whose G query heads are the rows of a tile of BM. GATHER is "packed", or an exhibit."""
    kv_head, sequence = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = HQ // HKV
    row, dim = tl.arange(0, BM), tl.arange(0, WIDTH)
    at = (sequence * HQ + kv_head * G + row)[:, None] * D + dim[None, :]
    mine = (row < G)[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + at, mask=mine, other=0.0)  # [BM, WIDTH]
    length = tl.load(lengths_ptr + sequence)
    keys_ptr += kv_head * D
    values_ptr += kv_head * D
    tables_ptr += sequence * table_row
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, WIDTH), tl.float32)
    for first in range(0, length, BN):
        token = first + tl.arange(0, BN)
        inside = token < length
        if GATHER == "packed":
            slots = _slots(tables_ptr, token, inside, P)
        else:
            page = first // P + tl.arange(0, BN // P)
            block = tl.load(tables_ptr + page, mask=page * P < length, other=0).to(tl.int64)
            paged = (block * P)[:, None] + tl.arange(0, P)[None, :]  # [BN/P, P]
            slots = tl.reshape(paged, (BN,))
        if GATHER == "page_gather":
            at_key = tl.reshape((paged * (HKV * D))[:, :, None] + dim[None, None, :], (BN, WIDTH))
            wanted = inside[:, None] & (dim < D)[None, :]
            k = tl.load(keys_ptr + at_key, mask=wanted, other=0.0)
            v = tl.load(values_ptr + at_key, mask=wanted, other=0.0)
        else:
            k = _rows(keys_ptr, slots, inside, HKV * D, D, WIDTH)  # [BN, WIDTH]
            v = _rows(values_ptr, slots, inside, HKV * D, D, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BM, BN]
        weights, fade, top, total = _fade_rows(tl.where(inside[None, :], scores, float("-inf")), top, total)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
    tl.store(out_ptr + at, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, lengths_ptr, tables_ptr, sums_ptr, lse_ptr, table_row, scale, splits,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """As `packed` for one of `splits` ranges: its sums, and log2 of the total of its weights, are kept in float32."""
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = HQ // HKV
    row, dim = tl.arange(0, BM), tl.arange(0, WIDTH)
    head = sequence * HQ + kv_head * G + row
    mine = (row < G)[:, None] & (dim < D)[None, :]
    length = tl.load(lengths_ptr + sequence)
    chunk = tl.cdiv(tl.cdiv(length, splits), BN) * BN
    begin = split * chunk
    end = tl.minimum(begin + chunk, length)
    if begin >= length:  # a short sequence has fewer ranges; its other partials are never read
        tl.store(lse_ptr + head * splits + split, tl.full((BM,), float("-inf"), tl.float32), mask=row < G)
        return
    q = tl.load(q_ptr + head[:, None] * D + dim[None, :], mask=mine, other=0.0)  # [BM, WIDTH]
    keys_ptr += kv_head * D
    values_ptr += kv_head * D
    tables_ptr += sequence * table_row
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, WIDTH), tl.float32)
    for first in range(begin, end, BN):
        token = first + tl.arange(0, BN)
        inside = token < end
        slots = _slots(tables_ptr, token, inside, P)
        k = _rows(keys_ptr, slots, inside, HKV * D, D, WIDTH)  # [BN, WIDTH]
        v = _rows(values_ptr, slots, inside, HKV * D, D, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BM, BN]
        weights, fade, top, total = _fade_rows(tl.where(inside[None, :], scores, float("-inf")), top, total)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
    place = (head * splits + split).to(tl.int64)
    tl.store(sums_ptr + place[:, None] * D + dim[None, :], sums / total[:, None], mask=mine)
    tl.store(lse_ptr + place, top + tl.log2(total), mask=row < G)


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, lse_ptr, out_ptr, splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    """A program: one query head, whose partial sums are weighted by their share of the total."""
    head = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    place = head.to(tl.int64) * splits + split
    lse = tl.load(lse_ptr + place, mask=split < splits, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))  # the first range is never empty, so the maximum is finite
    real = (lse > float("-inf"))[:, None] & (dim < D)[None, :]
    sums = tl.load(sums_ptr + place[:, None] * D + dim[None, :], mask=real, other=0.0)  # [SPLITS, WIDTH]
    merged = tl.sum(weights[:, None] * sums, 0) / tl.sum(weights, 0)
    tl.store(out_ptr + head * D + dim, merged.to(out_ptr.dtype.element_ty), mask=dim < D)


@dataclass(frozen=True)
class Tile:
    """Tokens that a program holds at once (`naive` and `online` hold a page instead), its warps and stages."""

    block_n: int
    warps: int
    stages: int


TILES = {
    "naive": Tile(16, 1, 3),  # one warp: sums over a page need no shared memory, and more programs are resident
    "online": Tile(16, 1, 3),
    "tiled": Tile(64, 4, 3),
    "packed": Tile(64, 4, 3),
    "split": Tile(64, 4, 3),
    **dict.fromkeys(EXHIBITS, Tile(64, 4, 3)),
}


def run(
    rung: str,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    block_n: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of one token a sequence on its pages.

    Args:
        rung: of `RUNGS` or `EXHIBITS`.
        q: [B, Hq, D], float32 or a 16-bit type.
        keys, values: [blocks, P, Hkv, D] of that type. Slots behind a sequence's length may hold anything, NaN too.
        seq_lens: [B] int32, at least 1, the new token included.
        block_tables: [B, n] int32, any row stride.
        scale: of the scores.
        block_n, warps, stages: of the tile; by default those of `TILES`.
        splits: ranges of a sequence, for `split`; by default as many as fill a GPU.

    Returns:
        [B, Hq, D].

    Raises:
        ValueError: an unknown rung, or a tensor that is not contiguous.
    """
    if rung not in KERNELS:
        raise ValueError(f"no rung {rung!r}: there are {', '.join(KERNELS)}")
    for name, tensor in (("q", q), ("keys", keys), ("values", values)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}: copy it")
    (batch, hq, dim), (_, page, hkv, _) = q.shape, keys.shape
    tile = TILES[rung]
    constants = _constants(rung, hq, hkv, dim, page, block_n or tile.block_n)
    launch = {"num_warps": warps or tile.warps, "num_stages": stages or tile.stages}
    out = torch.empty_like(q)
    read = (q, keys, values, seq_lens, block_tables)
    row = block_tables.stride(0)
    folded = scale if rung == "naive" else scale * math.log2(math.e)
    if rung != "split":
        programs = hkv if "BM" in constants else hq
        KERNELS[rung][programs, batch](*read, out, row, folded, **constants, **launch)
        return out
    splits = splits or splits_of(batch, hkv, block_tables.shape[1] * page, constants["BN"])
    sums = q.new_empty(batch, hq, splits, dim, dtype=torch.float32)
    lse = q.new_empty(batch, hq, splits, dtype=torch.float32)
    split_kernel[splits, hkv, batch](*read, sums, lse, row, folded, splits, **constants, **launch)
    merge_kernel[hq, batch](
        sums, lse, out, splits, D=dim, WIDTH=constants["WIDTH"], SPLITS=triton.next_power_of_2(splits)
    )
    return out


def splits_of(batch: int, kv_heads: int, longest: int, block_n: int) -> int:
    """Ranges for `split` that give a GPU enough programs, each with a tile at least."""
    return max(1, min(PROGRAMS // (batch * kv_heads), triton.cdiv(longest, block_n), MAX_SPLITS))


KERNELS: dict[str, Any] = {
    "naive": naive_kernel,
    "online": online_kernel,
    "tiled": tiled_kernel,
    "packed": packed_kernel,
    "split": split_kernel,
    **dict.fromkeys(EXHIBITS, packed_kernel),
}


def _constants(rung: str, hq: int, hkv: int, dim: int, page: int, block_n: int) -> dict[str, Any]:
    sizes = {"HQ": hq, "HKV": hkv, "D": dim, "WIDTH": triton.next_power_of_2(dim), "P": page}
    if rung in ("naive", "online"):
        return {**sizes, "PAGE": triton.next_power_of_2(page)}
    if rung == "tiled":
        return {**sizes, "BN": block_n}
    sizes |= {"BN": block_n, "BM": max(ROWS, triton.next_power_of_2(hq // hkv))}
    return sizes if rung == "split" else {**sizes, "GATHER": rung}


def build(rung: str, dim: int, tile: Tile | None = None, *, hq: int = 32, hkv: int = 8, page: int = 16) -> TritonBuild:
    """A build in bfloat16, for any number of sequences; pointers and rows of the tables are multiples of 16 bytes."""
    tile = tile or TILES[rung]
    data = ("q_ptr", "keys_ptr", "values_ptr")
    results = {"sums_ptr": "*fp32", "lse_ptr": "*fp32"} if rung == "split" else {"out_ptr": "*bf16"}
    tables = {"lengths_ptr": "*i32", "tables_ptr": "*i32"}
    numbers = {"table_row": "i32", "scale": "fp32"} | ({"splits": "i32"} if rung == "split" else {})
    signature = {**dict.fromkeys(data, "*bf16"), **tables, **results, **numbers}
    constants = _constants(rung, hq, hkv, dim, page, tile.block_n)
    divisible = (*data, *tables, *results, "table_row")
    label = f"triton decode {rung} {hq}/{hkv}x{dim}"
    return TritonBuild(label, KERNELS[rung], signature, constants, divisible, tile.warps, tile.stages)


def build_merge(dim: int, splits: int = MAX_SPLITS) -> TritonBuild:
    """The merge of up to so many ranges, into bfloat16."""
    signature = {"sums_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32"}
    constants = {"D": dim, "WIDTH": triton.next_power_of_2(dim), "SPLITS": splits}
    label = f"triton decode merge {splits}x{dim}"
    return TritonBuild(label, merge_kernel, signature, constants, ("sums_ptr", "lse_ptr", "out_ptr"))


AOT = (*(build(rung, dim) for dim in (64, 128) for rung in RUNGS), build_merge(64), build_merge(128))
