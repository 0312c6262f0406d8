"""Turn, quantise, write, step by step: every step is an operation of its own, on its own memory."""

from __future__ import annotations

import torch
from torch import Tensor

from phase2_rope.framework.rope import rotate
from phase3_paged_attention.kv_format import LEAST_SCALE, format_of


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
) -> Tensor:
    """Turn q and k by their positions; k and v are in the cache afterwards, each divided by its scale.

    Args:
        q, k, v: [T, Hq, D] and twice [T, Hkv, D], usually views of one activation; q and k may be overwritten.
        cos_sin, positions: what `Rotary` gives. On a CPU cosines and sines, each [T, 1, R/2] in q's dtype; on a GPU the
            table [rows, R] float32 and each token's row [T] int64.
        slots: block and place in it of each token, two of [T] int64.
        kv: keys and values, each [blocks, P, Hkv, D] in FP8, and their scales in float32: [1] are read, those of
            [blocks, P, Hkv] are found for each key and value, and written. Changed in place.
        interleaved: pairs are (x[2i], x[2i+1]) as in GPT-J; else (x[i], x[i + R/2]) as in Llama.

    Returns:
        q turned.
    """
    # TASK 3.4: count the operations below, and the bytes that each moves: on a GPU every one is a launch that reads
    # what the one before it wrote, and k goes eight times through memory to end as one byte a number. Make it one
    # launch: the turned key is in your registers, its largest number is one reduction away, and only the result is
    # wanted in memory.
    turned, key = rotate(q, k, cos_sin, positions, interleaved=interleaved)
    kept = format_of(kv)
    keys, values, k_scale, v_scale = kv
    for stored, scales, x in ((keys, k_scale, key), (values, v_scale, v)):
        wide = x.float()  # [T, Hkv, D]
        scale = scales
        if kept.per_token:
            largest = wide.abs().amax(dim=-1)  # [T, Hkv]
            scale = torch.clamp(largest / kept.largest, min=LEAST_SCALE)
            scales[slots] = scale
        divided = wide / scale.unsqueeze(-1)
        inside = torch.clamp(divided, -kept.largest, kept.largest)
        stored[slots] = inside.to(kept.dtype)
    return turned
