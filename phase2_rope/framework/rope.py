"""The turn as it is written in textbooks, then the paged write: every product is a tensor of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from phase0_prototype.attention import write_kv
from phase2_rope.rotary import reads_table


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Turn the first R dims of every head by its token's position (Su et al., 2021, arXiv 2104.09864).

    Args:
        q, k: [T, Hq, D] and [T, Hkv, D], any strides. They may be overwritten: use what is returned.
        cos, sin: what `Rotary` gives. On a CPU each [T, 1, R/2] in q's dtype, R <= D; on a GPU the table [rows, R]
            float32 and each token's row [T] int64.
        interleaved: pairs are (x[2i], x[2i+1]) as in GPT-J and DeepSeek; else (x[i], x[i + R/2]) as in Llama.

    Returns:
        q and k turned, in the layout that they had.
    """
    # TASK 2.2: q and k are turned one after the other, into new memory, in seven operations each that read or write it
    # nine times. Turn them where they lie, both at once if they lie side by side, in as few operations as torch has for
    # it. On a GPU that is one launch of your kernel, which reads the table itself.
    if reads_table((cos, sin)):
        cos, sin = cos[sin].to(q.dtype).unsqueeze(1).chunk(2, dim=-1)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor],
    kv: tuple[Tensor, Tensor],
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`rotate`, and keys and values are in the cache afterwards.

    Args:
        q, k, v: [T, Hq, D] and twice [T, Hkv, D], usually views of one activation; q and k may be overwritten.
        rotary: what `Rotary` gives, see `rotate`.
        slots: block and place in it of each token, two of [T] int64.
        kv: one layer of the cache, keys and values [blocks, P, Hkv, D], written in place.
        interleaved: see `rotate`.

    Returns:
        q and k turned; None for k where it is turned in the cache alone: the kernel moves it once.
    """
    # TASK 2.2: on a GPU the write is a launch of its own, and reads again what the turn has just written.
    turned, key = rotate(q, k, *rotary, interleaved=interleaved)
    write_kv(*kv, slots, key, v)
    return turned, key


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = 2 * cos.shape[-1]
    if interleaved:
        first, second = x[..., 0:width:2], x[..., 1:width:2]
    else:
        first, second = x[..., :width].chunk(2, dim=-1)
    halves = (first * cos - second * sin, second * cos + first * sin)
    parts = (torch.stack(halves, dim=-1).flatten(-2),) if interleaved else halves
    return torch.cat((*parts, x[..., width:]), dim=-1)
