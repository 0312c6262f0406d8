"""One decode loop for two caches, GQA's and MLA's, to compare what their tiles cost; not a kernel of the engine.

One new token a sequence, its cache in one piece, all of its keys read by one program (one split); online softmax in
powers of two (FlashAttention, arXiv 2205.14135). Both loops are the same. What differs is the tile:

    GQA   K [BN, D] and V [BN, D] of one KV head. Its G query heads are the rows of a tile of BM = 16, the least that a
          tensor core takes. 4 D bytes a key and 4 D G FLOPs: G FLOPs a byte.
    MLA   one row of L + R numbers a token for all H heads: C [BN, L] is loaded once and used twice, transposed as K
          and as it lies as V; beside it the rotary key [BN, R]. BH heads are the rows of a tile.
          2 (L + R) bytes a key and 2 (2 L + R) BH FLOPs: 1.9 BH FLOPs a byte.

`once=False` is what a kernel for GQA would do with MLA's cache: load C as K, and load it again as V. `padded=True` is
what Triton's powers of two ask for without the split: L + R = 576 becomes 1024, in every tile.

The interpreter (TRITON_INTERPRET=1) runs this in float32 and float16; for bfloat16 it is silently wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from module0_profiling.triton_compile import TritonBuild

ROWS = 16  # of the smallest tile that a tensor core multiplies
BF16 = 2  # bytes
# The sizes of the builds: Llama-3-70B and DeepSeek-V3.
HQ, HKV, D = 64, 8, 128
H, L, R = 128, 512, 64


@triton.jit
def _softmax_step(scores, inside, top, total):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """Weights of one tile of scores [M, BN], by how much earlier sums fade, and the new maximum and total [M]."""
    scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)  # 0 in the first round, where top is -inf and higher is not: a tile has a key
    return weights, fade, higher, total * fade + tl.sum(weights, 1)


@triton.jit
def gqa_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, lengths_ptr, out_ptr, capacity, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, one KV head, the G query heads that read it; `scale` has log2(e) in it."""
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    G: tl.constexpr = HQ // HKV
    row, key, dim = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    mine = (row < G)[:, None]
    at = (sequence * HQ + kv_head * G + row)[:, None] * D + dim[None, :]
    q = tl.load(q_ptr + at, mask=mine, other=0.0)  # [BM, D]
    length = tl.load(lengths_ptr + sequence)
    keys_ptr += (sequence * capacity * HKV + kv_head) * D
    values_ptr += (sequence * capacity * HKV + kv_head) * D
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, D), tl.float32)
    for first in range(0, length, BN):
        inside = first + key < length
        tile = (first + key)[:, None] * (HKV * D) + dim[None, :]  # the heads of a token lie side by side
        k = tl.load(keys_ptr + tile, mask=inside[:, None], other=0.0)  # [BN, D]
        v = tl.load(values_ptr + tile, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weights, fade, top, total = _softmax_step(scores, inside, top, total)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
    tl.store(out_ptr + at, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit
def mla_kernel(  # type: ignore[no-untyped-def]
    q_ptr, cache_ptr, again_ptr, lengths_ptr, out_ptr, capacity, scale,
    H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, ONCE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, BH heads, every one of which reads the same rows.

    WIDTH is L, with the rotary dims in a tile of their own, or a power of two that holds L + R. `again_ptr` is the same
    cache by another name: so the compiler can't see that it loads twice.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head, key, dim = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BN), tl.arange(0, WIDTH)
    SPLIT: tl.constexpr = WIDTH == L
    mine, held = (head < H)[:, None], (dim < (L if SPLIT else L + R))[None, :]
    at = (sequence * H + head)[:, None] * (L + R)
    q = tl.load(q_ptr + at + dim[None, :], mask=mine & held, other=0.0)  # [BH, WIDTH]
    cache_ptr += sequence * capacity * (L + R)
    again_ptr += sequence * capacity * (L + R)
    if SPLIT:
        turned = L + tl.arange(0, R)[None, :]
        q_turned = tl.load(q_ptr + at + turned, mask=mine, other=0.0)  # [BH, R]
    length = tl.load(lengths_ptr + sequence)
    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    sums = tl.zeros((BH, WIDTH), tl.float32)
    for first in range(0, length, BN):
        inside = first + key < length
        rows = (first + key)[:, None] * (L + R)
        c = tl.load(cache_ptr + rows + dim[None, :], mask=inside[:, None] & held, other=0.0)  # [BN, WIDTH]
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
        if SPLIT:
            k = tl.load(cache_ptr + rows + turned, mask=inside[:, None], other=0.0)  # [BN, R]
            scores = tl.dot(q_turned, tl.trans(k), scores, input_precision="ieee")
        weights, fade, top, total = _softmax_step(scores * scale, inside, top, total)
        v = c if ONCE else tl.load(again_ptr + rows + dim[None, :], mask=inside[:, None] & held, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
    out = out_ptr + (sequence * H + head)[:, None] * L + dim[None, :]
    tl.store(out, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine & (dim < L)[None, :])


def gqa(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, block_n: int = 64, warps: int = 4, stages: int = 3
) -> Tensor:
    """Attention of one token a sequence, scaled by D^-0.5.

    Args:
        q: [B, Hq, D], float32 or a 16-bit type; D is a power of two. All tensors are contiguous.
        keys, values: [B, capacity, Hkv, D] of that type, Hq / Hkv at most 16.
        lengths: [B] int32, tokens of each sequence that are there, at least 1.
        block_n, warps, stages: of the tile.

    Returns:
        [B, Hq, D].
    """
    (batch, hq, dim), (_, capacity, hkv, _) = q.shape, keys.shape
    out = torch.empty_like(q)
    gqa_kernel[batch, hkv](
        q, keys, values, lengths, out, capacity, dim**-0.5 * math.log2(math.e),
        HQ=hq, HKV=hkv, D=dim, BM=ROWS, BN=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def mla(
    q: Tensor,
    cache: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    rope: int = R,
    once: bool = True,
    padded: bool = False,
    block_h: int = 64,
    block_n: int = 32,
    warps: int = 8,
    stages: int = 2,
) -> Tensor:
    """Attention of one token a sequence on latents, in the absorbed form: sums of latents, W_UV comes behind them.

    Args:
        q: [B, H, L + R], W_UK absorbed; float32 or a 16-bit type; L and R are powers of two. All are contiguous.
        cache: [B, capacity, L + R] of that type.
        lengths: [B] int32, tokens of each sequence that are there, at least 1.
        scale: of the scores, (P + R)^-0.5 and not (L + R)^-0.5.
        rope: R.
        once, padded: see the head of this file.
        block_h, block_n, warps, stages: of the tile.

    Returns:
        [B, H, L].
    """
    (batch, heads, entry), capacity = q.shape, cache.shape[1]
    latent = entry - rope
    out = q.new_empty(batch, heads, latent)
    mla_kernel[batch, triton.cdiv(heads, block_h)](
        q, cache, cache, lengths, out, capacity, scale * math.log2(math.e),
        H=heads, L=latent, R=rope, WIDTH=triton.next_power_of_2(entry) if padded else latent, ONCE=once,
        BH=block_h, BN=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Tile:
    """What one program of a build holds, in bfloat16. GQA: 64 query heads on 8 KV heads of 128; MLA: DeepSeek-V3's 128.

    Attributes:
        cache: "GQA" or "MLA".
        rows: BM or BH.
        keys: BN.
        warps, stages: of the build.
        once, padded: of MLA, see the head of this file.
    """

    cache: str
    rows: int
    keys: int
    warps: int
    stages: int
    once: bool = True
    padded: bool = False

    @property
    def label(self) -> str:
        """As in "MLA 64x32, 8 warps, 2 stages"."""
        stages = f"{self.stages} stage{'s' if self.stages > 1 else ''}"
        return f"{self._variant} {self.rows}x{self.keys}, {self.warps} warps, {stages}"

    @property
    def kind(self) -> str:
        """What decides its bytes and FLOPs, as in "MLA, 64 rows"."""
        return f"{self._variant}, {self.rows} rows"

    @property
    def _variant(self) -> str:
        return self.cache + ("" if self.once else " loaded twice") + (" padded" if self.padded else "")

    @property
    def width(self) -> int:
        """Columns of the sums that a program keeps."""
        if self.cache == "GQA":
            return D
        return int(triton.next_power_of_2(L + R)) if self.padded else L

    def build(self) -> TritonBuild:
        """The build; pointers are multiples of 16, the capacity is not known."""
        if self.cache == "GQA":
            kernel, data = gqa_kernel, ("q_ptr", "keys_ptr", "values_ptr", "out_ptr")
            constants = {"HQ": HQ, "HKV": HKV, "D": D, "BM": self.rows, "BN": self.keys}
        else:
            kernel, data = mla_kernel, ("q_ptr", "cache_ptr", "again_ptr", "out_ptr")
            constants = {"H": H, "L": L, "R": R, "BH": self.rows, "BN": self.keys}
            constants |= {"WIDTH": self.width, "ONCE": self.once}
        signature = {**dict.fromkeys(data, "*bf16"), "lengths_ptr": "*i32", "capacity": "i32", "scale": "fp32"}
        divisible = (*data, "lengths_ptr")
        return TritonBuild(self.label, kernel, signature, constants, divisible, self.warps, self.stages)


GQA_TILE = Tile("GQA", ROWS, 64, warps=4, stages=3)
MLA_TILE = Tile("MLA", 64, 32, warps=8, stages=2)
AOT = (GQA_TILE.build(), MLA_TILE.build())
