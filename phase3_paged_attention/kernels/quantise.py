"""Turn, quantise, write: how new keys and values enter an 8-bit cache.

Read from the activation and written to the cache once: 2 Hkv D numbers of 2 bytes in, as many of 1 byte out, a scale or
two beside them. Done one after the other, these are a turn, a largest number, a division, a clamp, a cast and a write,
and each reads again what the one before has written: six to nine launches, about ten times the bytes. On a GPU it is
one launch (kernels/quantise_triton.py), in which the largest number of a key is known while the key is in registers.
This is the CPU's path, and the twin that the kernel is tested against.
"""

from __future__ import annotations

from torch import Tensor

from phase2_rope.rope import rotate
from phase2_rope.rotary import reads_table
from phase3_paged_attention.kv_format import format_of


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
    if reads_table((cos_sin, positions)):
        from phase3_paged_attention.kernels import quantise_triton

        quantise_triton.rotate_quantise_write(q, k, v, cos_sin, positions, slots, kv, interleaved=interleaved)
        return q
    turned, key = rotate(q, k, cos_sin, positions, interleaved=interleaved)
    kept = format_of(kv)
    keys, values, k_scale, v_scale = kv
    for stored, scales, x in ((keys, k_scale, key), (values, v_scale, v)):
        scale = scales
        if kept.per_token:
            scale = kept.scales_of(x)  # [T, Hkv]
            scales.index_put_(slots, scale)
        stored.index_put_(slots, kept.quantise(x, scale))
    return turned
