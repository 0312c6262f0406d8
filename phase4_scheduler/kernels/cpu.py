"""The C++ of this folder as functions of tensors. What each computes is torch's: the tests hold them against it.

All tensors are on the CPU, float32 or bfloat16, and sums are kept in float32. Addresses and sizes are passed as they
are: who calls has to see to it that the tables name blocks of the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phase4_scheduler.kernels import library

COLUMNS = 32  # of a panel, see product.cpp
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _function(name: str, dtype: torch.dtype | None = None) -> Callable[..., None]:
    found = library.library(library.BUILD)
    return getattr(found, name if dtype is None else f"{name}_{str(dtype).removeprefix('torch.')}")  # type: ignore[no-any-return]


def why_not_product() -> str | None:
    """Why `product` can't run here; None when it can."""
    if why := library.why_not_cpu_kernels():
        return why
    return None if library.library(library.BUILD).has_product() else "this CPU has no AVX512-BF16"


def in_panels(n: int, k: int) -> tuple[int, int, int, int] | None:
    """The shape of a weight [n, k] as `product` reads it, [n / 32, k / 2, 32, 2]; None where it can't be cut so."""
    return None if n % COLUMNS or k % 2 else (n // COLUMNS, k // 2, COLUMNS, 2)


def fill_panels(out: Tensor, weight: Tensor) -> None:
    """Write a weight [n, k], of any dtype, into panels of the shape that `in_panels` says."""
    pairs = weight.to(out.dtype).contiguous().view(torch.int32)  # [n, k / 2]
    out.view(torch.int32).squeeze(-1).copy_(pairs.unflatten(0, (-1, COLUMNS)).transpose(1, 2))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, k] times the transpose of the weight [n, k], plus bias [n]: [T, n], all bfloat16.

    Args:
        weight: in panels, see `in_panels`.
    """
    x = x.contiguous()
    blocks, half = weight.shape[0], weight.shape[1]
    assert x.shape[1] == 2 * half and x.dtype == weight.dtype
    out = torch.empty(x.shape[0], blocks * COLUMNS, dtype=x.dtype)
    _function("product")(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        blocks * COLUMNS,
        2 * half,
        torch.get_num_threads(),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim: `torch.nn.functional.rms_norm`, rounded once.

    Args:
        x: [rows, size], rows at any distance; more dims where they lie side by side.
        weight: [size], x's dtype.
    """
    size = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, size)
    assert weight.shape == (size,) and weight.dtype == x.dtype
    out = torch.empty(x.shape, dtype=x.dtype)
    _function("norm", x.dtype)(
        rows.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        size,
        rows.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return out


GATES = ("silu", "gelu_tanh")


def gated(x: Tensor, activation: str) -> Tensor:
    """activation(gate) * up.

    Args:
        x: [T, 2 * size], gate and up side by side.
        activation: of `GATES`.

    Returns:
        [T, size].
    """
    x = x.contiguous()
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, size, dtype=x.dtype)
    kind, threads = GATES.index(activation), torch.get_num_threads()
    _function("gate", x.dtype)(x.data_ptr(), out.data_ptr(), rows, size, kind, threads)
    return out


def turn_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor],
    kv: tuple[Tensor, Tensor],
) -> None:
    """Turn q and k in place, pairs (x[i], x[i + R/2]), and put k and v into the cache: see `phase2_rope.rope`.

    Args:
        q, k, v: [T, Hq, D] and twice [T, Hkv, D], views of one activation: heads side by side,
            tokens equally far apart.
        rotary: cos and sin, [T, 1, R/2].
        slots: block and place in it of each token, two of [T] int64.
        kv: keys and values [blocks, P, Hkv, D].
    """
    tokens, heads, dim = q.shape
    cos, sin = rotary
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    blocks, places = (x.contiguous() for x in slots)
    _function("turn", q.dtype)(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        blocks.data_ptr(),
        places.data_ptr(),
        kv[0].data_ptr(),
        kv[1].data_ptr(),
        tokens,
        heads,
        k.shape[1],
        dim,
        cos.shape[-1],
        q.stride(0),
        cos.stride(0),
        kv[0].shape[1],
        torch.get_num_threads(),
    )


def can_turn(q: Tensor, k: Tensor, v: Tensor, kv: tuple[Any, ...]) -> bool:
    """Whether `turn_and_write` can take these tensors."""
    return (
        q.stride() == k.stride() == v.stride()
        and q.stride()[1:] == (q.shape[2], 1)
        and all(side.dtype == q.dtype and side.is_contiguous() for side in kv)
    )


def attend(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    starts: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of the last tokens of each sequence to its pages.

    Args:
        q: [T, Hq, D], heads side by side.
        kv: keys and values [blocks, P, Hkv, D], contiguous, Hq a multiple of Hkv; the tokens' own are in them.
        starts: [S + 1] int64, sequence s has rows starts[s] .. starts[s + 1] - 1 of q, at least one.
        tables: [S, n] int64, their blocks, filled up with anything.
        lengths: [S] int64, their tokens, these included.
        scale: of the scores.
        window: tokens that a query sees, itself included; None: all.
        soft_cap: scores become cap * tanh(score / cap).

    Returns:
        [T, Hq, D].
    """
    assert q.stride()[1:] == (q.shape[2], 1) and tables.stride(1) == 1
    out = torch.empty(q.shape, dtype=q.dtype)
    _function("attend", q.dtype)(
        q.data_ptr(),
        kv[0].data_ptr(),
        kv[1].data_ptr(),
        starts.data_ptr(),
        tables.data_ptr(),
        lengths.data_ptr(),
        out.data_ptr(),
        len(lengths),
        tables.stride(0),
        q.stride(0),
        q.shape[1],
        kv[0].shape[2],
        q.shape[2],
        kv[0].shape[1],
        window or 0,
        scale,
        soft_cap or 0.0,
        torch.get_num_threads(),
    )
    return out
