"""RoPE: the torch twin of the kernels, and the host side of `rope.cu`.

The twin is the oracle (give it float64) and the CPU path; `rope_triton` has the same three functions. `call` and
`call_and_write` turn tensors into a launch of any kernel of the ladder, on a GPU or in the emulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from phase0_prototype.kernels import emulated, launch
from phase0_prototype.kernels.operation import Call

SOURCE = Path(__file__).with_suffix(".cu")
SCALARS = {torch.bfloat16: "SCALAR_BF16", torch.float16: "SCALAR_F16", torch.float32: "SCALAR_F32"}
VECTOR_BYTES = 16
MAX_ROTATED = 512  # kMaxRotated in rope.cu
LANES = 32  # of a warp, which turns one token
TOKENS = 4  # of a block of the last versions
BLOCKS = 1024  # that keep any GPU of today busy: with fewer, the heads of a token are dealt out to several
Slots = tuple[Tensor, Tensor]
Args = tuple[Tensor | int, ...]


def rotate(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> None:
    """Turn the first R dims of every head by its token's position, in place.

    Args:
        q, k: [T, Hq, D] and [T, Hkv, D], of any strides.
        cos_sin: [rows, R] float32 (or q's dtype), R <= D: R/2 columns of cos, then R/2 of sin.
        positions: [T] int64, rows of `cos_sin`.
        interleaved: pairs are (x[2i], x[2i+1]), as in GPT-J; else (x[i], x[i + R/2]), as in GPT-NeoX and Llama.

    Computes in float32, for float64 in float64, and rounds once.
    """
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
    for out, x in ((out_q, q), (out_k, k)):
        out.copy_(_turned(x, cos_sin[positions], interleaved))


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
    """Turn q in place; write the turned k, and v, to their places in one layer of the paged cache; leave k as it was.

    Args:
        q, k, v: [T, Hq, D], [T, Hkv, D] twice, of any strides.
        slots: two of [T] int64, the block and the place in it; a negative block is padding: nothing is written.
        keys, values: [blocks, P, Hkv, D]; values, and v, may have another width: MLA writes its latent as v.
    """
    rows = cos_sin[positions]
    q.copy_(_turned(q, rows, interleaved))
    real = slots[0] >= 0
    block, place = slots[0][real], slots[1][real]
    keys[block, place] = _turned(k, rows, interleaved)[real]
    values[block, place] = v[real]


def _turned(x: Tensor, rows: Tensor, interleaved: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (part[:, None] for part in rows.to(dtype).chunk(2, dim=-1))  # [T, 1, R/2]
    rotated = rows.shape[-1]
    out = x.to(dtype, copy=True)
    pair = out[..., :rotated].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    first, second = (part.clone() for part in pair.unbind(axis))
    pair.select(axis, 0).copy_(first * cos - second * sin)
    pair.select(axis, 1).copy_(second * cos + first * sin)
    return out.to(x.dtype)


def call(
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
) -> Call:
    """Arguments of the kernels that only turn; in place unless outputs are given. Raises ValueError for bad sizes."""
    out_q, out_k = q if out_q is None else out_q, k if out_k is None else out_k
    _check(q, k, cos_sin, positions)
    vectors = vectors_fit((q, k, out_q, out_k), cos_sin)
    strides = [s for x in (q, k, out_q, out_k) for s in x.stride()[:2]]
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], cos_sin.shape[1], int(interleaved), int(vectors))
    args: Args = (q, k, out_q, out_k, cos_sin, positions, *sizes, *strides)
    return _call(q, q.shape[1] + k.shape[1], cos_sin, vectors, args)


def call_and_write(
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
) -> Call:
    """Arguments of `rope_fast` and of `kv_write` (which ignores q). Raises ValueError for sizes that do not fit."""
    _check(q, k, cos_sin, positions)
    if v.shape != k.shape or keys.shape[2:] != k.shape[1:] or values.shape != keys.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (k, v, keys, values))
        raise ValueError(f"k and v are [T, Hkv, D], keys and values [blocks, P, Hkv, D]: got {shapes}")
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError(f"keys and values must lie alike: strides are {keys.stride()} and {values.stride()}")
    vectors = vectors_fit((q, k, v, keys, values), cos_sin)
    strides = [s for x in (q, k, v) for s in x.stride()[:2]] + list(keys.stride()[:3])
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], cos_sin.shape[1], int(interleaved), int(vectors))
    args: Args = (q, k, v, keys, values, cos_sin, positions, *slots, *sizes, *strides)
    return _call(q, q.shape[1] + 2 * k.shape[1], cos_sin, vectors, args)


def prepare(version: str, prepared: Call, *, source: Path = SOURCE) -> Callable[[], None]:
    """A callable that launches a version once: on a GPU, or for CPU tensors in the emulation. No tokens: no launch."""
    if prepared.cols == 0:
        return lambda: None
    where = emulated if prepared.out.device.type == "cpu" else launch
    return where.prepare(source, version, prepared)


def vectors_fit(tensors: Sequence[Tensor], cos_sin: Tensor) -> bool:
    """Whether 128-bit accesses are allowed: every pointer and stride a multiple of 16 bytes, R/2 and D of a vector."""
    width = VECTOR_BYTES // tensors[0].element_size()
    half, dim = cos_sin.shape[1] // 2, tensors[0].shape[-1]
    if half % width or dim % width or half // width > LANES or cos_sin.data_ptr() % VECTOR_BYTES:
        return False
    return all(
        x.data_ptr() % VECTOR_BYTES == 0
        and all(size == 1 or stride % width == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))
        for x in tensors
    )


def head_groups(tokens: int, heads: int, rotated: int, element_size: int, vectors: bool) -> int:
    """Blocks along y: how many warps share the heads of one token. One for many tokens, which fill the GPU alone."""
    pairs = VECTOR_BYTES // element_size if vectors else 1  # that a lane turns at once
    at_once = max(1, LANES // max(1, rotated // 2 // pairs))  # heads that a warp holds
    return max(1, min(-(-heads // at_once), BLOCKS // -(-tokens // TOKENS) if tokens else 1))


def _call(q: Tensor, heads: int, cos_sin: Tensor, vectors: bool, args: Args) -> Call:
    tokens = q.shape[0]
    groups = head_groups(tokens, heads, cos_sin.shape[1], q.element_size(), vectors)
    return Call(q, groups, tokens, args, (SCALARS[q.dtype],))


def _check(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    tokens, _, dim = q.shape
    rotated = cos_sin.shape[1]
    if q.dtype not in SCALARS or k.dtype != q.dtype:
        raise ValueError(f"q and k are bfloat16, float16 or float32, both alike: got {q.dtype} and {k.dtype}")
    if k.shape[0] != tokens or k.shape[2] != dim or positions.shape != (tokens,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, positions))
        raise ValueError(f"q is [T, Hq, D], k [T, Hkv, D], positions [T]: got {shapes}")
    if rotated % 2 or not 0 < rotated <= min(dim, MAX_ROTATED):
        raise ValueError(f"cos_sin has {rotated} columns: an even number up to {min(dim, MAX_ROTATED)} is possible")
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous() or positions.dtype != torch.int64:
        raise ValueError("cos_sin must be float32 and contiguous, positions int64")
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError(f"the dims of a head must be neighbours: strides are {q.stride()} and {k.stride()}")
