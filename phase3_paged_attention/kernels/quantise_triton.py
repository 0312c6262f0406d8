"""RoPE, FP8 and the paged write in one launch: `kernels.quantise` on a GPU.

Bytes: q in and out; k and v once in, one byte a number out; a row of cos and sin once a token; 4 bytes for each key and
value where they have scales of their own. Phase 2's kernel, and what is new happens in registers: the largest of a
turned key is a reduction over the lanes that hold it, then each number is multiplied, clamped and rounded to 8 bits.

The GPU's conversion is used where there is one (sm_89 and later). Elsewhere, and in the interpreter, whose casts to
FP8 wrap around and lose the smallest numbers, the same bits are made by integers. The interpreter (TRITON_INTERPRET=1)
runs this in float32 and float16; for bfloat16 it is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from module0_profiling.triton_compile import TritonBuild
from phase2_rope.kernels.rope_triton import Tile, _cos_sin, _power, _turn_heads
from phase3_paged_attention.kv_format import LEAST_SCALE

MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}  # bits
LEAST = tl.constexpr(LEAST_SCALE)


@triton.jit
def _bits(x, MANTISSA: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """float32, within the ends of the format, as the bits of FP8: rounded to nearest, ties to even; NaN stays NaN."""
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    DROPPED: tl.constexpr = 23 - MANTISSA
    # float32's last bit is worth a subnormal's last one here, so adding this rounds subnormals where they must be
    UNIT: tl.constexpr = (127 + DROPPED + 1 - BIAS) << 23
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size - ((127 - BIAS) << 23) + ((1 << (DROPPED - 1)) - 1) + ((size >> DROPPED) & 1)) >> DROPPED
    unit = tl.full(x.shape, UNIT, tl.int32).to(tl.float32, bitcast=True)
    small = (size.to(tl.float32, bitcast=True) + unit).to(tl.int32, bitcast=True) - UNIT
    found = tl.where(size < ((128 - BIAS) << 23), small, normal)
    found = tl.where(size > 0x7F800000, 0x7F, found)
    return (found | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store(target, x, inverse, mask, MANTISSA: tl.constexpr, CONVERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write x / scale in FP8; what lies beyond the ends becomes the end."""
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    inside = tl.clamp(x * inverse, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(target, inside.to(target.dtype.element_ty) if CONVERTS else _bits(inside, MANTISSA), mask=mask)


@triton.jit
def _scale(largest, scale_ptr, at, mask, MANTISSA: tl.constexpr, PER_TOKEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of each head, [BLOCK_T, BLOCK_H, 1]: found and stored, or the one of the tensor."""
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    if PER_TOKEN:
        scale = tl.maximum(largest * (1 / LARGEST), LEAST)
        tl.store(scale_ptr + at, scale, mask=mask)
        return scale[:, :, None]
    else:
        return tl.load(scale_ptr)


@triton.jit
def _quantise_heads(  # type: ignore[no-untyped-def]
    in_rows, in_head, out_rows, out_head, scale_ptr, scale_rows, read, written, cos, sin, first, step,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    MANTISSA: tl.constexpr, PER_TOKEN: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """Turn the first R dims of all heads of some tokens and write all D in FP8; `scale_rows` [BLOCK_T] as pointers."""
    for group in range(first, (HEADS + BLOCK_H - 1) // BLOCK_H, step):
        heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
        head = heads[None, :, None]
        source = in_rows[:, None, None] + head * in_head
        target = out_rows[:, None, None] + head * out_head
        real, kept = read[:, None, None] & (head < HEADS), written[:, None, None] & (head < HEADS)
        if INTERLEAVED:
            dim = tl.arange(0, 2 * HALF)[None, None, :]
            pairs = tl.load(source + dim, mask=real & (dim < R), other=0.0).to(tl.float32)
            x, y = tl.split(tl.reshape(pairs, (BLOCK_T, BLOCK_H, HALF, 2)))
        else:
            dim = tl.arange(0, HALF)[None, None, :]
            x = tl.load(source + dim, mask=real & (dim < R // 2), other=0.0).to(tl.float32)
            y = tl.load(source + dim + R // 2, mask=real & (dim < R // 2), other=0.0).to(tl.float32)
        x, y = x * cos - y * sin, y * cos + x * sin
        largest = tl.max(tl.maximum(tl.abs(x), tl.abs(y)), axis=2)  # [BLOCK_T, BLOCK_H]
        if REST > 0:
            further = R + tl.arange(0, REST)[None, None, :]
            rest = tl.load(source + further, mask=real & (further < D), other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=2))
        at, wanted = scale_rows[:, None] + heads[None, :], written[:, None] & (heads < HEADS)[None, :]
        inverse = 1.0 / _scale(largest, scale_ptr, at, wanted, MANTISSA, PER_TOKEN)
        if INTERLEAVED:
            turned = tl.reshape(tl.join(x, y), (BLOCK_T, BLOCK_H, 2 * HALF))
            _store(target + dim, turned, inverse, kept & (dim < R), MANTISSA, CONVERTS)
        else:
            _store(target + dim, x, inverse, kept & (dim < R // 2), MANTISSA, CONVERTS)
            _store(target + dim + R // 2, y, inverse, kept & (dim < R // 2), MANTISSA, CONVERTS)
        if REST > 0:
            _store(target + further, rest, inverse, kept & (further < D), MANTISSA, CONVERTS)


@triton.jit
def rope_quantise_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, table_ptr, positions_ptr,
    blocks_ptr, places_ptr, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, block_stride, place_stride, head_stride,
    scale_block, scale_place,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
    MANTISSA: tl.constexpr, PER_TOKEN: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_T tokens; programs along y share their heads. As phase 2's `rope_write_kernel`."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    block = tl.load(blocks_ptr + t, mask=inside, other=-1)
    place = tl.load(places_ptr + t, mask=inside, other=0)
    cos, sin = _cos_sin(table_ptr, positions_ptr, t, inside, R, HALF, not EVEN or 2 * HALF != R)
    row, first, step = t.to(tl.int64), tl.program_id(1), tl.num_programs(1)
    real = inside & (block >= 0)  # a negative block is padding
    block = tl.where(real, block, 0)
    slot, scale_row = block * block_stride + place * place_stride, block * scale_block + place * scale_place
    q, k, v = q_ptr + row * q_token, k_ptr + row * k_token, v_ptr + row * v_token
    QG: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    KG: tl.constexpr = (HK + BLOCK_H - 1) // BLOCK_H
    first_k = (first + step * QG - QG) % step
    first_v = (first + step * (QG + KG) - QG - KG) % step
    _turn_heads(q, q_head, q, q_head, inside, inside, cos, sin, first, step,
                HQ, R, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, not EVEN)  # fmt: skip
    _quantise_heads(k, k_head, keys_ptr + slot, head_stride, k_scale_ptr, scale_row, inside, real, cos, sin,
                    first_k, step, HK, D, R, HALF, REST, INTERLEAVED, BLOCK_T, BLOCK_H,
                    MANTISSA, PER_TOKEN, CONVERTS)  # fmt: skip
    dim = tl.arange(0, WIDTH)[None, None, :]
    for group in range(first_v, KG, step):
        heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
        head = heads[None, :, None]
        some = (head < HK) & (dim < D)
        x = tl.load(v[:, None, None] + head * v_head + dim, mask=inside[:, None, None] & some, other=0.0)
        x = x.to(tl.float32)
        at, wanted = scale_row[:, None] + heads[None, :], real[:, None] & (heads < HK)[None, :]
        scale = _scale(tl.max(tl.abs(x), axis=2), v_scale_ptr, at, wanted, MANTISSA, PER_TOKEN)
        target = (values_ptr + slot)[:, None, None] + head * head_stride + dim
        _store(target, x, 1.0 / scale, real[:, None, None] & some, MANTISSA, CONVERTS)


def rotate_quantise_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: tuple[Tensor, Tensor],
    kv: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    interleaved: bool = False,
    converts: bool | None = None,
) -> None:
    """Turn q in place, write the turned k and v to the cache in FP8, leave k as it was: see `kernels.quantise`.

    Args:
        q, k, v, slots, kv, interleaved: see there; q, k and v are bfloat16, float16 or float32.
        cos_sin, positions: [rows, R] float32 and [T] int64.
        converts: whether the GPU's conversion to FP8 is used; by default where it has one.

    Raises:
        ValueError: keys and values, or their scales, have different strides.
    """
    (tokens, hq, dim), hk, rotated = q.shape, k.shape[1], cos_sin.shape[1]
    keys, values, k_scale, v_scale = kv
    if keys.stride() != values.stride() or k_scale.stride() != v_scale.stride():
        raise ValueError(f"keys and values must lie alike: strides are {keys.stride()} and {values.stride()}")
    if tokens == 0:
        return
    mantissa, per_token = MANTISSA[keys.dtype], k_scale.dim() > 1
    if converts is None:
        converts = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 9)
    if not converts:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    tile = Tile.of(tokens, hq + 2 * hk, rotated)
    rope_quantise_kernel[triton.cdiv(tokens, tile.tokens), tile.groups](
        q, k, v, keys, values, k_scale, v_scale, cos_sin, positions, *slots, tokens,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3],
        *(k_scale.stride()[:2] if per_token else (0, 0)),
        HQ=hq, HK=hk, D=dim, R=rotated, HALF=_power(rotated // 2), REST=_power(dim - rotated), WIDTH=_power(dim),
        INTERLEAVED=interleaved, BLOCK_T=tile.tokens, BLOCK_H=tile.heads, EVEN=tokens % tile.tokens == 0,
        MANTISSA=mantissa, PER_TOKEN=per_token, CONVERTS=converts,
        num_warps=tile.warps,
    )  # fmt: skip


def _build(hq: int, hk: int, dim: int, *, per_token: bool, converts: bool = False, few: bool = False) -> TritonBuild:
    """For many tokens (or few) in bfloat16 into e4m3."""
    tile = Tile.of(1 if few else 65536, hq + 2 * hk, dim)
    strides = [f"{n}_{what}" for n in ("q", "k", "v") for what in ("token", "head")]
    strides += ["block_stride", "place_stride", "head_stride"]
    activation, cache = ["q_ptr", "k_ptr", "v_ptr"], ["keys_ptr", "values_ptr"]
    floats = ["k_scale_ptr", "v_scale_ptr", "table_ptr"]
    signature = {
        **dict.fromkeys(activation, "*bf16"),
        **dict.fromkeys(cache, "*fp8e4nv" if converts else "*u8"),
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(("positions_ptr", "blocks_ptr", "places_ptr"), "*i64"),
        **dict.fromkeys((*strides, "scale_block", "scale_place", "tokens"), "i32"),
    }
    constants: dict[str, Any] = {
        "HQ": hq, "HK": hk, "D": dim, "R": dim, "HALF": dim // 2, "REST": 0, "WIDTH": dim, "INTERLEAVED": False,
        "BLOCK_T": tile.tokens, "BLOCK_H": tile.heads, "EVEN": True,
        "MANTISSA": 3, "PER_TOKEN": per_token, "CONVERTS": converts,
    }  # fmt: skip
    label = f"triton rope fp8 {hq}+{hk}x{dim}{' per token' * per_token}{' one token' * few}"
    divisible = (*activation, *cache, *floats, *strides)
    return TritonBuild(label, rope_quantise_kernel, signature, constants, divisible, num_warps=tile.warps)


SHAPES = ((32, 8, 128), (32, 4, 64))
AOT = (
    *(_build(*shape, per_token=per_token) for shape in SHAPES for per_token in (False, True)),
    _build(32, 8, 128, per_token=True, few=True),
)
CONVERTING = tuple(
    _build(*shape, per_token=per_token, converts=True) for shape in SHAPES for per_token in (False, True)
)
"""Builds that use the GPU's conversion: for sm_89 and later."""
