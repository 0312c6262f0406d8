"""Triton twin of the last steps of `rope.cu`: RoPE in place or out of place, and RoPE with the write into the cache.

Bytes: q, k (and v) once in and once out, a row of cos and sin once a token. A program takes a few tokens and steps
through groups of their heads, with cos and sin in registers; where there are few tokens, several programs share the
heads. Masks are compiled in only where a size is ragged. Same functions as `kernels.rope`, which is the oracle.

The interpreter (TRITON_INTERPRET=1) runs this in float32 and float16; for bfloat16 it is silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from module0_profiling.triton_compile import TritonBuild

PROGRAMS = 1024  # that keep any GPU of today busy
FEW_TOKENS = 1024  # up to here a program takes one token
ELEMENTS = 2048  # that a program holds at once: 16 for each of 128 threads, two loads of 128 bits
Slots = tuple[Tensor, Tensor]


@triton.jit
def _cos_sin(table_ptr, positions_ptr, t, inside, R: tl.constexpr, HALF: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """cos and sin of some tokens, [BLOCK_T, 1, HALF] float32 each; HALF is a power of two, at least R/2."""
    pair = tl.arange(0, HALF)
    if MASKED:
        position = tl.load(positions_ptr + t, mask=inside, other=0)
        at = table_ptr + position[:, None] * R + pair[None, :]
        wanted = inside[:, None] & (pair < R // 2)[None, :]
        cos = tl.load(at, mask=wanted, other=0.0)
        sin = tl.load(at + R // 2, mask=wanted, other=0.0)
    else:
        at = table_ptr + tl.load(positions_ptr + t)[:, None] * R + pair[None, :]
        cos = tl.load(at)
        sin = tl.load(at + R // 2)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def _move(in_ptrs, out_ptrs, read, written, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy elements as they are."""
    if MASKED:
        tl.store(out_ptrs, tl.load(in_ptrs, mask=read, other=0.0), mask=written)
    else:
        tl.store(out_ptrs, tl.load(in_ptrs))


@triton.jit
def _copy_heads(  # type: ignore[no-untyped-def]
    in_rows, in_head, out_rows, out_head, read, written, first, step,
    HEADS: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Copy dims BEGIN to END of all heads of some tokens, `step` groups of heads apart; WIDTH is a power of two."""
    dim = BEGIN + tl.arange(0, WIDTH)[None, None, :]
    for group in range(first, (HEADS + BLOCK_H - 1) // BLOCK_H, step):
        head = (group * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
        real = (head < HEADS) & (dim < END)
        _move(
            in_rows[:, None, None] + head * in_head + dim,
            out_rows[:, None, None] + head * out_head + dim,
            read[:, None, None] & real,
            written[:, None, None] & real,
            MASKED or HEADS % BLOCK_H != 0 or WIDTH != END - BEGIN,
        )


@triton.jit
def _turn_heads(  # type: ignore[no-untyped-def]
    in_rows, in_head, out_rows, out_head, read, written, cos, sin, first, step,
    HEADS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Turn the first R dims of all heads of some tokens; rows are pointers [BLOCK_T], masks [BLOCK_T]."""
    RAGGED: tl.constexpr = MASKED or HEADS % BLOCK_H != 0 or 2 * HALF != R
    for group in range(first, (HEADS + BLOCK_H - 1) // BLOCK_H, step):
        head = (group * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
        source = in_rows[:, None, None] + head * in_head
        target = out_rows[:, None, None] + head * out_head
        element = target.dtype.element_ty
        if INTERLEAVED:
            dim = tl.arange(0, 2 * HALF)[None, None, :]
            real = (head < HEADS) & (dim < R)
            if RAGGED:
                pairs = tl.load(source + dim, mask=read[:, None, None] & real, other=0.0)
            else:
                pairs = tl.load(source + dim)
            x, y = tl.split(tl.reshape(pairs.to(tl.float32), (BLOCK_T, BLOCK_H, HALF, 2)))
            turned = tl.reshape(tl.join(x * cos - y * sin, y * cos + x * sin), (BLOCK_T, BLOCK_H, 2 * HALF))
            if RAGGED:
                tl.store(target + dim, turned.to(element), mask=written[:, None, None] & real)
            else:
                tl.store(target + dim, turned.to(element))
        else:
            dim = tl.arange(0, HALF)[None, None, :]
            real = (head < HEADS) & (dim < R // 2)
            if RAGGED:
                x = tl.load(source + dim, mask=read[:, None, None] & real, other=0.0).to(tl.float32)
                y = tl.load(source + dim + R // 2, mask=read[:, None, None] & real, other=0.0).to(tl.float32)
                tl.store(target + dim, (x * cos - y * sin).to(element), mask=written[:, None, None] & real)
                tl.store(target + dim + R // 2, (y * cos + x * sin).to(element), mask=written[:, None, None] & real)
            else:
                x = tl.load(source + dim).to(tl.float32)
                y = tl.load(source + dim + R // 2).to(tl.float32)
                tl.store(target + dim, (x * cos - y * sin).to(element))
                tl.store(target + dim + R // 2, (y * cos + x * sin).to(element))


@triton.jit
def rope_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, out_q_ptr, out_k_ptr, table_ptr, positions_ptr, tokens,
    q_token, q_head, k_token, k_head, out_q_token, out_q_head, out_k_token, out_k_head,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program turns BLOCK_T tokens; programs along y share their heads. REST > 0: dims from R on are copied."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    cos, sin = _cos_sin(table_ptr, positions_ptr, t, inside, R, HALF, not EVEN or 2 * HALF != R)
    row, first, step = t.to(tl.int64), tl.program_id(1), tl.num_programs(1)
    q, out_q = q_ptr + row * q_token, out_q_ptr + row * out_q_token
    k, out_k = k_ptr + row * k_token, out_k_ptr + row * out_k_token
    QG: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    first_k = (first + step * QG - QG) % step  # the groups of k go on where those of q ended
    _turn_heads(q, q_head, out_q, out_q_head, inside, inside, cos, sin, first, step,
                HQ, R, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, not EVEN)  # fmt: skip
    _turn_heads(k, k_head, out_k, out_k_head, inside, inside, cos, sin, first_k, step,
                HK, R, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, not EVEN)  # fmt: skip
    if REST > 0:
        _copy_heads(q, q_head, out_q, out_q_head, inside, inside, first, step, HQ, R, D, REST, BLOCK_H, not EVEN)
        _copy_heads(k, k_head, out_k, out_k_head, inside, inside, first_k, step, HK, R, D, REST, BLOCK_H, not EVEN)


@triton.jit
def rope_write_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, blocks_ptr, places_ptr, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, block_stride, place_stride, head_stride,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """As `rope_kernel`; k goes to its place in the cache as it is turned, v as it is."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    block = tl.load(blocks_ptr + t, mask=inside, other=-1)
    place = tl.load(places_ptr + t, mask=inside, other=0)
    cos, sin = _cos_sin(table_ptr, positions_ptr, t, inside, R, HALF, not EVEN or 2 * HALF != R)
    row, first, step = t.to(tl.int64), tl.program_id(1), tl.num_programs(1)
    real = inside & (block >= 0)  # a negative block is padding
    slot = tl.where(real, block, 0) * block_stride + place * place_stride
    q, k, v = q_ptr + row * q_token, k_ptr + row * k_token, v_ptr + row * v_token
    QG: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    KG: tl.constexpr = (HK + BLOCK_H - 1) // BLOCK_H
    first_k = (first + step * QG - QG) % step
    first_v = (first + step * (QG + KG) - QG - KG) % step
    _turn_heads(q, q_head, q, q_head, inside, inside, cos, sin, first, step,
                HQ, R, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, not EVEN)  # fmt: skip
    _turn_heads(k, k_head, keys_ptr + slot, head_stride, inside, real, cos, sin, first_k, step,
                HK, R, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, True)  # fmt: skip
    _copy_heads(v, v_head, values_ptr + slot, head_stride, inside, real, first_v, step, HK, 0, DV, WIDTH, BLOCK_H, True)
    if REST > 0:
        _copy_heads(k, k_head, keys_ptr + slot, head_stride, inside, real, first_k, step, HK, R, D, REST, BLOCK_H, True)


@dataclass(frozen=True)
class Tile:
    """Tokens of a program, heads that it holds at once, programs that share the heads of a token, its warps."""

    tokens: int
    heads: int
    groups: int
    warps: int

    @classmethod
    def of(cls, tokens: int, heads: int, rotated: int) -> Tile:
        """One token a program where there are few tokens, else four; few programs are made more along the heads."""
        block_t = 1 if tokens <= FEW_TOKENS else 4
        wanted = max(1, ELEMENTS // (block_t * triton.next_power_of_2(rotated)))
        block_h = min(wanted, triton.next_power_of_2(heads))
        programs = triton.cdiv(tokens, block_t)
        groups = max(1, min(triton.cdiv(heads, block_h), PROGRAMS // programs))
        # No more threads than elements: a second thread with the same element could load what the first has turned.
        warps = max(1, min(4, block_t * block_h * rotated // 512))
        return cls(block_t, block_h, groups, warps)


def rotate(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> None:
    """Turn q and k in place; arguments and layout as for `kernels.rope.rotate`, with cos_sin in float32."""
    rotate_into(q, k, q, k, cos_sin, positions, interleaved=interleaved)


def rotate_into(
    out_q: Tensor,
    out_k: Tensor,
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """As `rotate`, into other tensors of the same shapes; dims from R on are copied."""
    (tokens, hq, dim), hk, rotated = q.shape, k.shape[1], cos_sin.shape[1]
    if tokens == 0:
        return
    tile = Tile.of(tokens, hq + hk, rotated)
    rest = 0 if out_q.data_ptr() == q.data_ptr() else dim - rotated
    rope_kernel[triton.cdiv(tokens, tile.tokens), tile.groups](
        q, k, out_q, out_k, cos_sin, positions, tokens,
        *q.stride()[:2], *k.stride()[:2], *out_q.stride()[:2], *out_k.stride()[:2],
        HQ=hq, HK=hk, D=dim, R=rotated, HALF=_power(rotated // 2), REST=_power(rest), INTERLEAVED=interleaved,
        BLOCK_T=tile.tokens, BLOCK_H=tile.heads, EVEN=tokens % tile.tokens == 0,
        num_warps=tile.warps,
    )  # fmt: skip


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Slots,
    keys: Tensor,
    values: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Turn q in place, write the turned k and v to the cache, leave k as it was: as `kernels.rope.rotate_and_write`.

    Raises:
        ValueError: keys and values have different strides.
    """
    (tokens, hq, dim), hk, rotated = q.shape, k.shape[1], cos_sin.shape[1]
    if keys.stride() != values.stride():
        raise ValueError(f"keys and values must lie alike: strides are {keys.stride()} and {values.stride()}")
    if tokens == 0:
        return
    tile = Tile.of(tokens, hq + 2 * hk, rotated)
    rope_write_kernel[triton.cdiv(tokens, tile.tokens), tile.groups](
        q, k, v, keys, values, cos_sin, positions, *slots, tokens,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3],
        HQ=hq, HK=hk, D=dim, R=rotated, HALF=_power(rotated // 2), REST=_power(dim - rotated),
        DV=v.shape[2], WIDTH=_power(v.shape[2]),
        INTERLEAVED=interleaved, BLOCK_T=tile.tokens, BLOCK_H=tile.heads, EVEN=tokens % tile.tokens == 0,
        num_warps=tile.warps,
    )  # fmt: skip


def _power(size: int) -> int:
    return triton.next_power_of_2(size) if size else 0


def _builds(hq: int, hk: int, dim: int, dv: int, *, interleaved: bool = False) -> tuple[TritonBuild, ...]:
    """For many tokens in bfloat16, in place, without the write and with it; values are `dv` wide."""
    layout = "interleaved " if interleaved else ""
    pointers = {"table_ptr": "*fp32", "positions_ptr": "*i64", "tokens": "i32"}
    sizes = {"HQ": hq, "HK": hk, "D": dim, "R": dim, "HALF": dim // 2, "REST": 0, "INTERLEAVED": interleaved}
    names = ["q", "k", "out_q", "out_k"]
    strides = [f"{name}_{what}" for name in names for what in ("token", "head")]
    tile = Tile.of(65536, hq + hk, dim)
    constants = {**sizes, "BLOCK_T": tile.tokens, "BLOCK_H": tile.heads, "EVEN": True}
    data = [f"{name}_ptr" for name in names]
    signature = {**dict.fromkeys(data, "*bf16"), **pointers, **dict.fromkeys(strides, "i32")}
    label = f"triton rope {layout}{hq}+{hk}x{dim}"
    found = [TritonBuild(label, rope_kernel, signature, constants, (*data, "table_ptr", *strides))]
    strides = [f"{n}_{what}" for n in ("q", "k", "v") for what in ("token", "head")]
    strides += ["block_stride", "place_stride", "head_stride"]
    data = [f"{name}_ptr" for name in ("q", "k", "v", "keys", "values")]
    slots = dict.fromkeys(("blocks_ptr", "places_ptr"), "*i64")
    signature = {**dict.fromkeys(data, "*bf16"), **pointers, **slots, **dict.fromkeys(strides, "i32")}
    tile = Tile.of(65536, hq + 2 * hk, dim)
    constants = {**constants, "BLOCK_T": tile.tokens, "BLOCK_H": tile.heads, "DV": dv, "WIDTH": dv}
    found.append(TritonBuild(f"{label} write", rope_write_kernel, signature, constants, (*data, "table_ptr", *strides)))
    return tuple(found)


AOT = (
    *_builds(32, 8, 128, 128),
    *_builds(32, 4, 64, 64),
    *_builds(64, 8, 128, 128),
    *_builds(128, 1, 64, 512, interleaved=True),  # MLA: slices of q, one key for all heads, a latent
)
