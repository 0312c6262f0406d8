"""The device side of `kernels.mla`: one Triton kernel for latents in q's type and for packed ones, and its builds.

    table    the place of an entry comes from the block table token by token: a page loaded as a whole loses Triton's
             pipelining. The blocks are loaded a round ahead: read in their own round, they are a load that another one
             waits for, Triton shares its stages between both, and with three nothing is copied in the background
    garbage  slots past a sequence's end may hold NaN: what a mask hides is 0 in the latent too, 0 * NaN is NaN
    packed   bits become float32, are multiplied with the scale of their group and rounded to q's type once. Where
             `mma.sync` multiplies, Triton does not copy them in the background, and keeps two layouts of what they are

The interpreter (TRITON_INTERPRET=1) runs this in float32 and float16; for bfloat16 it is silently wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from module0_profiling.triton_compile import TritonBuild
from phase3_paged_attention.kernels.latent_tiles import WIDEST_LATENT, WIDEST_ROPE, LatentTile, fitting, tiles_of
from phase3_paged_attention.latent_format import GROUP

QUANTISED = tl.constexpr(GROUP)  # numbers of a latent that share a scale


@triton.jit
def _numbers(bits, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """e4m3 as float32. Without the instruction: the same bits of a float16 are the number over 256."""
    if HARDWARE:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = bits.to(tl.int16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256


@triton.jit
def _entries(  # type: ignore[no-untyped-def]
    cache_ptr, scales_ptr, turned_ptr, at, inside, like,
    L: tl.constexpr, R: tl.constexpr, LW: tl.constexpr, RW: tl.constexpr, PACKED: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Latents [BN, LW] and rotary keys [BN, RW] at these places, as numbers of q's type; 0 where none is."""
    dim, turn, there = tl.arange(0, LW)[None, :], tl.arange(0, RW)[None, :], inside[:, None]
    if PACKED:
        GROUPS: tl.constexpr = LW // QUANTISED
        BYTES: tl.constexpr = L + L // QUANTISED * 4 + 2 * R
        bits = tl.load(cache_ptr + at[:, None] * BYTES + dim, mask=there & (dim < L), other=0)
        group = tl.arange(0, GROUPS)[None, :]
        scales = scales_ptr + at[:, None] * (BYTES // 4) + L // 4 + group
        factor = tl.load(scales, mask=there & (group < L // QUANTISED), other=0.0)
        grouped = tl.reshape(_numbers(bits, HARDWARE), (at.shape[0], GROUPS, QUANTISED)) * factor[:, :, None]
        latents = tl.reshape(grouped, (at.shape[0], LW)).to(like.dtype)
        turned = turned_ptr + at[:, None] * (BYTES // 2) + (L + L // QUANTISED * 4) // 2 + turn
        rotary = tl.load(turned, mask=there & (turn < R), other=0.0).to(tl.float32)  # bfloat16 where q is float32
        return latents, rotary.to(like.dtype)
    else:
        rows = cache_ptr + at[:, None] * (L + R)
        latents = tl.load(rows + dim, mask=there if LW == L else there & (dim < L), other=0.0)
        return latents, tl.load(rows + L + turn, mask=there if RW == R else there & (turn < R), other=0.0)


@triton.jit
def _seen(position, inside, past, token, bits, TOKENS: tl.constexpr, VISIBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which cached tokens a row may see, [BM or 1, BN]."""
    seen = inside[None, :]
    if TOKENS > 1:  # with one token, the end of the item is it
        seen &= position[None, :] <= (past + token)[:, None]
    if VISIBLE:
        place = (position - past)[None, :]  # among the new tokens
        bit = (bits[:, None] >> tl.minimum(tl.maximum(place, 0), 63).to(tl.int64)) & 1
        seen &= (place < 0) | (bits == -1)[:, None] | ((bit != 0) & (place < 64))
    return seen


@triton.jit
def latents_kernel(  # type: ignore[no-untyped-def]
    q_ptr, cache_ptr, scales_ptr, turned_ptr, tables_ptr, query_start_ptr, seq_lens_ptr, visible_ptr, items_ptr,
    out_ptr, partial_ptr, log2sum_ptr, scale, q_token, q_head, table_stride,
    H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, LW: tl.constexpr, RW: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr, HARDWARE: tl.constexpr, VISIBLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: an item of work and HEADS heads; row r of its tile is new token r // HEADS and head r % HEADS.

    Neighbours are the tiles of heads of one item, which read the same entries. LW and RW are powers of two that hold L
    and R; `scale` has log2(e) in it. PACKED: `cache_ptr` is bytes, `scales_ptr` and `turned_ptr` are the same memory as
    float32 and as 2-byte numbers.
    """
    HEAD_TILES: tl.constexpr = H // HEADS
    head_tile = tl.program_id(0) % HEAD_TILES
    items_ptr += tl.program_id(0) // HEAD_TILES * 6
    sequence = tl.load(items_ptr)
    if sequence < 0:
        return
    first, begin, end = tl.load(items_ptr + 1), tl.load(items_ptr + 2), tl.load(items_ptr + 3)
    slot = tl.load(items_ptr + 4)
    start, stop = tl.load(query_start_ptr + sequence), tl.load(query_start_ptr + sequence + 1)
    past = tl.load(seq_lens_ptr + sequence) - (stop - start)  # tokens before those of this step
    row, key, dim, turn = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, LW)[None, :], tl.arange(0, RW)[None, :]
    token, head = first + row // HEADS, head_tile * HEADS + row % HEADS  # [BM]
    real = (row < TOKENS * HEADS) & (start + token < stop)
    wanted = real[:, None] & (dim < L)
    queries = q_ptr + ((start + token).to(tl.int64) * q_token + head * q_head)[:, None]
    q = tl.load(queries + dim, mask=wanted, other=0.0)  # [BM, LW]
    q_turned = tl.load(queries + L + turn, mask=real[:, None] & (turn < R), other=0.0)  # [BM, RW]
    bits = tl.load(visible_ptr + start + token, mask=real, other=-1) if VISIBLE else row
    tables_ptr += sequence.to(tl.int64) * table_stride

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, LW), tl.float32)
    block = tl.load(tables_ptr + (begin + key) // P, mask=begin + key < end, other=0)  # [BN]
    for low in range(begin, end, BN):
        position = low + key
        inside = position < end
        at = (block.to(tl.int64) if WIDE else block) * P + position % P
        block = tl.load(tables_ptr + (position + BN) // P, mask=position + BN < end, other=0)  # of the next round
        c, k = _entries(cache_ptr, scales_ptr, turned_ptr, at, inside, q, L, R, LW, RW, PACKED, HARDWARE)
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
        scores = tl.dot(q_turned, tl.trans(k), scores, input_precision="ieee") * scale
        seen = _seen(position, inside, past, token, bits, TOKENS, VISIBLE)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = higher
        if TOKENS > 1 or VISIBLE:
            base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing: -inf - -inf is no number
        weights, fade = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(c.dtype), c, sums * fade[:, None], input_precision="ieee")
        top = higher

    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    if slot < 0:
        out = out_ptr + (((start + token).to(tl.int64) * H + head) * L)[:, None] + dim
        tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=wanted)
    else:
        place = (slot.to(tl.int64) * HEAD_TILES + head_tile) * BM + row
        tl.store(partial_ptr + place[:, None] * L + dim, sums, mask=wanted)
        tl.store(log2sum_ptr + place, top + tl.log2(total), mask=real)  # -inf where nothing was seen


def sizes(heads: int, latent: int, rope: int, page: int, tokens: int, group: int, tile: LatentTile) -> dict[str, int]:
    """The kernel's constants that are sizes."""
    widths = {"LW": max(16, triton.next_power_of_2(latent)), "RW": max(16, triton.next_power_of_2(rope))}
    shape = {"H": heads, "L": latent, "R": rope, **widths, "P": page}
    return {**shape, "TOKENS": tokens, "HEADS": group, "BM": tile.rows, "BN": tile.keys}


def build_of(
    tile: LatentTile, heads: int, *, packed: bool = False, tokens: int = 1, visible: bool = False, wide: bool = False
) -> TritonBuild:
    """A build for DeepSeek-V3's entries in bfloat16, with so many heads; pages of 64."""
    _, group = fitting(heads, tokens, (tile,))
    known = ("tables", "query_start", "seq_lens", "items")
    types = {
        "q": "bf16", "cache": "u8" if packed else "bf16", "scales": "fp32" if packed else "bf16", "turned": "bf16",
        **dict.fromkeys(known, "i32"), "visible": "i64", "out": "bf16",
        "partial": "fp32", "log2sum": "fp32",
    }  # fmt: skip
    signature = {f"{name}_ptr": f"*{number}" for name, number in types.items()}
    divisible = (*signature, "q_token", "q_head")
    signature |= {"scale": "fp32", "q_token": "i32", "q_head": "i32", "table_stride": "i32"}
    flags = {"PACKED": packed, "HARDWARE": tile.hardware, "VISIBLE": visible, "WIDE": wide}
    constants = {**sizes(heads, WIDEST_LATENT, WIDEST_ROPE, 64, tokens, group, tile), **flags}
    marks = [f"{tokens} tokens"] * (tokens > 1) + ["tree"] * visible + ["64-bit places"] * wide
    label = ", ".join([f"latents {'FP8' if packed else 'bf16'}, {heads} heads, {tile.label}", *marks])
    return TritonBuild(label, latents_kernel, signature, constants, divisible, tile.warps, tile.stages)


def builds_for(capability: tuple[int, int]) -> tuple[TritonBuild, ...]:
    """What DeepSeek-V3 launches on a GPU, whole (128 heads) and as a part of one in eight (16)."""
    found = []
    for packed in (False, True):
        tiles = tiles_of(capability, packed)
        large = fitting(128, 1, tiles)[0]
        found += [
            build_of(fitting(16, 1, tiles)[0], 16, packed=packed),
            build_of(large, 128, packed=packed),
            build_of(large, 128, packed=packed, visible=True),
            build_of(large, 128, packed=packed, wide=True),
        ]
        few = tiles[-1].rows // 16
        if few > 1:
            found.append(build_of(tiles[-1], 16, packed=packed, tokens=few))
    return tuple(found)


AOT = tuple(
    build_of(fitting(heads, 1, tiles_of((9, 0), packed))[0], heads, packed=packed)
    for packed in (False, True)
    for heads in (16, 128)
)
