"""The device side of `kernels.paged`: one Triton kernel, by what is compiled in a decode, a prompt or a tree.

A program takes an item of `Work`, some new tokens of one sequence with the G query heads of one KV head, and walks over
the cached tokens that they may see, page by page through the block table; online softmax in powers of two
(FlashAttention, arXiv 2205.14135), long sequences split (Flash-Decoding). The G heads are rows of one tile: keys and
values are read once for all of them.

    gather   each key's block is looked up, not each page's once: addresses of pages, reshaped to tokens, stop Triton
             from copying in the background
    ahead    blocks are looked up a round ahead: in its own round, the look-up is a load that another one waits for, and
             Triton spends half of its stages, and copies of 4 bytes, on the table
    masks    a decode has one loop, masked where the sequence ends: cheap next to the bytes. More tokens have two, a
             mask-free one over what all of them see and a masked one over the rest
    offsets  32 bits, unless the cache needs 64
    garbage  slots past a sequence's end may hold NaN: what a mask hides is 0 in V too, since 0 * NaN is NaN
    FP8      two numbers are loaded as one of 16 bits and moved apart by shifts, into even and odd columns with a
             product each: loads of matrices from shared memory know no 8-bit numbers, and a GPU's own conversion to
             bfloat16 runs at an eighth of the rate of shifts

The interpreter (TRITON_INTERPRET=1) runs this in float32 and float16; for bfloat16 it is silently wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phase3_paged_attention.kernels.merge import merged


@triton.jit
def _rows(pointers, inside, dim, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """Load [N, WIDTH] of rows of D numbers; 0 where a row or a dim is not there."""
    if MASKED:
        return tl.load(pointers, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    elif WIDTH != D:
        return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _pair(stored, like, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two neighbouring FP8 numbers, stored as one uint16, as two numbers of q's type; exact, subnormals included.

    The exponent and mantissa of an FP8 number are moved to the low end of a wider float's, which is smaller by a power
    of two: the difference of the biases. FORMAT: 1 is e4m3 (bias 7), 2 is e5m2 (15, as in float16).
    """
    BFLOAT: tl.constexpr = like.dtype == tl.bfloat16
    wide: tl.constexpr = tl.bfloat16 if BFLOAT else tl.float16
    SHIFT: tl.constexpr = (4 if FORMAT == 1 else 3) if BFLOAT else (1 if FORMAT == 1 else 0)  # of the upper byte
    low = stored << 8
    low = ((low & 0x8000) | ((low & 0x7F00) >> SHIFT)).to(wide, bitcast=True)
    high = ((stored & 0x8000) | ((stored & 0x7F00) >> SHIFT)).to(wide, bitcast=True)
    if BFLOAT:
        UP: tl.constexpr = 2.0**120 if FORMAT == 1 else 2.0**112
        return low * UP, high * UP
    elif FORMAT == 1:
        return (low * 256.0).to(like.dtype), (high * 256.0).to(like.dtype)
    else:
        return low.to(like.dtype), high.to(like.dtype)


@triton.jit
def _products(q, q_odd, k, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Queries times keys, [BLOCK_M, BLOCK_N] float32."""
    if FORMAT == 0:
        return tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        k_even, k_odd = _pair(k, q, FORMAT)
        scores = tl.dot(q, tl.trans(k_even), input_precision="ieee")
        return tl.dot(q_odd, tl.trans(k_odd), scores, input_precision="ieee")


@triton.jit
def _seen(  # type: ignore[no-untyped-def]
    position, inside, row_position, old, bits, window,
    TOKENS: tl.constexpr, WINDOWED: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """Which keys each row may see, [BLOCK_M or 1, BLOCK_N] bool. The keys of a tile of one token are all its own."""
    seen = inside[None, :]
    if TOKENS > 1:
        seen &= position[None, :] <= row_position[:, None]
        if WINDOWED:
            seen &= position[None, :] > row_position[:, None] - window
    if VISIBLE:
        j = position - old  # of this key among the new tokens
        bit = (bits[:, None] >> tl.minimum(tl.maximum(j, 0), 63)[None, :].to(tl.int64)) & 1
        seen &= (j < 0)[None, :] | (bits == -1)[:, None] | ((bit != 0) & (j < 64)[None, :])
    return seen


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    q, q_odd, top, total, sums, sums_odd, first, last, end, row_position, old, bits,
    keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, table_ptr, scale, cap, window,
    block_stride, place_stride, scale_block, scale_place,
    D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, FORMAT: tl.constexpr, PER_TOKEN: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, VISIBLE: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over cached tokens `first` to `last`; those from `end` on are not there."""
    key, dim = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    ahead = tl.load(table_ptr + (first + key) // P, mask=first + key < end, other=0)
    for begin in range(first, last, BLOCK_N):
        position = begin + key
        inside = position < end
        block = ahead.to(tl.int64) if WIDE else ahead
        ahead = tl.load(table_ptr + (position + BLOCK_N) // P, mask=position + BLOCK_N < end, other=0)
        at = (block * block_stride + position % P * place_stride)[:, None] + dim[None, :]
        k = _rows(keys_ptr + at, inside, dim, D, WIDTH, MASKED)
        v = _rows(values_ptr + at, inside, dim, D, WIDTH, MASKED)
        scores = _products(q, q_odd, k, FORMAT)  # [BLOCK_M, BLOCK_N]
        if PER_TOKEN:
            scale_at = block * scale_block + position % P * scale_place
            scores *= tl.load(k_scale_ptr + scale_at, mask=inside, other=0.0)[None, :]
            v_scale = tl.load(v_scale_ptr + scale_at, mask=inside, other=0.0)
        unit = scale  # of scores, in powers of two
        if CAPPED:  # cap * tanh(x) = cap - 2 cap / (e^2x + 1)
            scores = cap - 2.0 * cap / (tl.exp2(scores * scale) + 1.0)
            unit = 1.0
        if MASKED:
            seen = _seen(position, inside, row_position, old, bits, window, TOKENS, WINDOWED, VISIBLE)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = higher * unit
        if MASKED and (TOKENS > 1 or VISIBLE):
            base = tl.where(higher == float("-inf"), 0.0, base)  # a row that sees nothing: -inf - -inf is no number
        weights = tl.exp2(scores * unit - base[:, None])
        fade = tl.exp2(top * unit - base)
        top, total = higher, total * fade + tl.sum(weights, 1)
        if PER_TOKEN:
            weights *= v_scale[None, :]
        weights = weights.to(q.dtype)
        if FORMAT == 0:
            sums = tl.dot(weights, v, sums * fade[:, None], input_precision="ieee")
        else:
            v_even, v_odd = _pair(v, q, FORMAT)
            sums = tl.dot(weights, v_even, sums * fade[:, None], input_precision="ieee")
            sums_odd = tl.dot(weights, v_odd, sums_odd * fade[:, None], input_precision="ieee")
    return top, total, sums, sums_odd


@triton.jit
def _merge_if_last(  # type: ignore[no-untyped-def]
    out, partial_ptr, log2sum_ptr, merges_ptr, counters_ptr, slot, splits, merges, kv_head, row, real, wanted,
    HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, MERGES: tl.constexpr,
):  # fmt: skip
    """The program that arrives last at the counter of its tile merges all of its splits, and leaves the counter 0."""
    tile = tl.arange(0, MERGES)
    first_slots = tl.load(merges_ptr + tile * 4 + 2, mask=tile < merges, other=-1)
    splits_of = tl.load(merges_ptr + tile * 4 + 3, mask=tile < merges, other=0)
    mine = (first_slots <= slot) & (slot < first_slots + splits_of)
    counter_ptr = counters_ptr + tl.sum(tl.where(mine, tile, 0), 0) * HKV + kv_head
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.store(counter_ptr, 0)
        result = merged(
            partial_ptr + kv_head * BLOCK_M * D, log2sum_ptr + kv_head * BLOCK_M,
            tl.sum(tl.where(mine, first_slots, 0), 0), splits, row, real, HKV * BLOCK_M, D, WIDTH, BLOCK_M,
            64 // BLOCK_M if BLOCK_M <= 64 else 1,
        )  # fmt: skip
        tl.store(out, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    result, log2sum, out, partial_ptr, log2sum_ptr, items_ptr, merges_ptr, counters_ptr, merges, kv_head, row, real,
    HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr, LAST_BLOCK: tl.constexpr, MERGES: tl.constexpr,
):  # fmt: skip
    """Write an item's rows [BLOCK_M, WIDTH]: the result, or the partial one of a split, merged where it is the last."""
    dim = tl.arange(0, WIDTH)
    wanted = real[:, None] & (dim < D)[None, :]
    if not SPLIT:
        tl.store(out, result.to(out.dtype.element_ty), mask=wanted)
        return
    slot = tl.load(items_ptr + 4)
    if slot < 0:
        tl.store(out, result.to(out.dtype.element_ty), mask=wanted)
    else:
        at = (slot.to(tl.int64) * HKV + kv_head) * BLOCK_M + row
        tl.store(partial_ptr + at[:, None] * D + dim[None, :], result, mask=wanted)
        tl.store(log2sum_ptr + at, log2sum, mask=real)
        if LAST_BLOCK:
            splits = tl.load(items_ptr + 5)
            _merge_if_last(
                out, partial_ptr, log2sum_ptr, merges_ptr, counters_ptr, slot, splits, merges,
                kv_head, row, real, wanted, HKV, D, WIDTH, BLOCK_M, MERGES,
            )  # fmt: skip


# Counts that change from step to step must not be compiled in.
@triton.jit(do_not_specialize=["window", "merges", "table_stride"])
def paged_kernel(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, out_ptr, partial_ptr, log2sum_ptr,
    items_ptr, merges_ptr, counters_ptr, query_start_ptr, seq_lens_ptr, tables_ptr, visible_ptr,
    scale, cap, window, merges,
    q_token, q_head, block_stride, place_stride, head_stride, scale_block, scale_place, scale_head, table_stride,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, VISIBLE: tl.constexpr,
    SPLIT: tl.constexpr, LAST_BLOCK: tl.constexpr, MERGES: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one item, one KV head; neighbours are the heads of one item, whose numbers lie side by side."""
    G: tl.constexpr = HQ // HKV
    kv_head = tl.program_id(0) % HKV
    items_ptr += tl.program_id(0) // HKV * 6
    sequence = tl.load(items_ptr)
    if sequence < 0:
        return
    first_token, begin, end = tl.load(items_ptr + 1), tl.load(items_ptr + 2), tl.load(items_ptr + 3)
    start, stop = tl.load(query_start_ptr + sequence), tl.load(query_start_ptr + sequence + 1)
    old = tl.load(seq_lens_ptr + sequence) - (stop - start)  # tokens before those of this step
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride

    row, dim = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    token = start + first_token + row // G  # a row of q
    real = (row < TOKENS * G) & (token < stop)
    head = kv_head * G + row % G
    row_position = old + first_token + row // G
    at = token.to(tl.int64) * q_token + head * q_head
    q = _rows(q_ptr + at[:, None] + dim[None, :], real, dim, D, WIDTH, True)
    bits = tl.load(visible_ptr + token, mask=real, other=0) if VISIBLE else row_position
    STORED: tl.constexpr = D if FORMAT == 0 else D // 2  # FP8 comes in pairs
    COLUMNS: tl.constexpr = WIDTH if FORMAT == 0 else WIDTH // 2
    if FORMAT == 0:
        q_odd = q
    else:
        q, q_odd = tl.split(tl.reshape(q, (BLOCK_M, COLUMNS, 2)))

    keys_ptr += kv_head.to(tl.int64) * head_stride
    values_ptr += kv_head.to(tl.int64) * head_stride
    if SCALES == 1:
        scale *= tl.load(k_scale_ptr)
    elif SCALES == 2:
        k_scale_ptr += kv_head * scale_head
        v_scale_ptr += kv_head * scale_head
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    sums_odd = sums if FORMAT == 0 else tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    first = begin
    if (TOKENS > 1 or VISIBLE) and not (TOKENS > 1 and WINDOWED):  # whole tiles that every row sees
        shared = old if VISIBLE else old + first_token + 1
        first += tl.maximum(tl.minimum(shared, end) - begin, 0) // BLOCK_N * BLOCK_N
        top, total, sums, sums_odd = _walk(
            q, q_odd, top, total, sums, sums_odd, begin, first, end, row_position, old, bits,
            keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, table_ptr, scale, cap, window,
            block_stride, place_stride, scale_block, scale_place,
            STORED, COLUMNS, P, FORMAT, SCALES == 2, CAPPED, WINDOWED, VISIBLE, TOKENS, WIDE, BLOCK_N, False,
        )  # fmt: skip
    top, total, sums, sums_odd = _walk(
        q, q_odd, top, total, sums, sums_odd, first, end, end, row_position, old, bits,
        keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, table_ptr, scale, cap, window,
        block_stride, place_stride, scale_block, scale_place,
        STORED, COLUMNS, P, FORMAT, SCALES == 2, CAPPED, WINDOWED, VISIBLE, TOKENS, WIDE, BLOCK_N, True,
    )  # fmt: skip

    result = sums if FORMAT == 0 else tl.interleave(sums, sums_odd)
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    if SCALES == 1:
        result *= tl.load(v_scale_ptr)
    out = out_ptr + ((token.to(tl.int64) * HQ + head) * D)[:, None] + dim[None, :]
    log2sum = (top if CAPPED else top * scale) + tl.log2(total)  # -inf where a row saw nothing
    _write(
        result, log2sum, out, partial_ptr, log2sum_ptr, items_ptr, merges_ptr, counters_ptr, merges,
        kv_head, row, real, HKV, D, WIDTH, BLOCK_M, SPLIT, LAST_BLOCK, MERGES,
    )  # fmt: skip
