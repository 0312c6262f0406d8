"""The turn itself: queries and keys by their positions, and the paged write that follows it.

On a GPU one kernel does both (kernels/rope_triton.py). This is the CPU's path. The minimum is to read and write q and k
once; torch has no operation that does this for pairs (x[i], x[i + R/2]). What is left are three things:

    in place    the activation that q and k are views of is needed by nobody once they are turned
    joined      q and k lie side by side in it, so one operation turns both
    multiply-add  `addcmul` adds a product to what it reads: four operations that read or write q and k five times;
                the formula as written (four products, two sums, cat) has seven and nine

Pairs (x[2i], x[2i + 1]) are complex numbers in memory: there it is one multiplication. Under torch.compile the formula
as written is the faster one: the compiler fuses it into one loop, and a change in place would only get in its way.
"""

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
    if reads_table((cos, sin)):
        from phase2_rope.kernels import rope_triton

        rope_triton.rotate(q, k, cos, sin, interleaved=interleaved)
        return q, k
    if torch.compiler.is_compiling():
        return _fused(q, cos, sin, interleaved), _fused(k, cos, sin, interleaved)
    rotated = 2 * cos.shape[-1]
    joined = _joined(q, k, rotated)
    for x in (q[..., :rotated], k[..., :rotated]) if joined is None else (joined,):
        if interleaved:
            _multiply_complex(x, cos, sin)
        else:
            _turn_halves(x, cos, sin)
    return q, k


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
    if reads_table(rotary):
        from phase2_rope.kernels import rope_triton

        rope_triton.rotate_and_write(q, k, v, *rotary, slots, *kv, interleaved=interleaved)
        return q, None
    q, k = rotate(q, k, *rotary, interleaved=interleaved)
    write_kv(*kv, slots, k, v)
    return q, k


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """[T, H, R] in place, pairs (x[i], x[i + R/2])."""
    first, second = x.chunk(2, dim=-1)
    crossed = first * sin  # before `first` changes
    first.mul_(cos).addcmul_(second, sin, value=-1)
    torch.addcmul(crossed, second, cos, out=second)


def _multiply_complex(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """[T, H, R] in place, pairs (x[2i], x[2i + 1]): each is multiplied by cos + i sin, in float32 at least."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = x.unflatten(-1, (-1, 2))  # [T, H, R/2, 2]
    as_it_lies = x.dtype == wide and all(n % 2 == 0 for n in (*pairs.stride()[:-1], pairs.storage_offset()))
    numbers = pairs if as_it_lies else pairs.to(wide, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(numbers).mul_(torch.complex(cos.to(wide), sin.to(wide)))
    if not as_it_lies:
        pairs.copy_(numbers)


def _fused(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[T, H, D] -> the same turned: one expression, for a compiler to make one loop of."""
    rotated = 2 * cos.shape[-1]
    pairs = x[..., :rotated].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    first, second = pairs.unbind(axis)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), axis).flatten(-2)
    return torch.cat((turned, x[..., rotated:]), dim=-1) if rotated < x.shape[-1] else turned


def _joined(q: Tensor, k: Tensor, rotated: int) -> Tensor | None:
    """The first R dims of q and k as one tensor [T, Hq + Hkv, R], where k's heads lie behind q's in the same memory."""
    strides, (tokens, heads, _) = q.stride(), q.shape
    behind = heads * strides[1]
    if k.stride() != strides or k.shape[0] != tokens or k.storage_offset() - q.storage_offset() != behind:
        return None
    if k.data_ptr() - q.data_ptr() != behind * q.itemsize:  # another memory, at the fitting offset
        return None
    return q.as_strided((tokens, heads + k.shape[1], rotated), strides)
