"""Torch twin of the paged kernel: dense attention of one sequence at a time, every score and every mask written out.

Slow, any device, any type; in float64 it is the oracle of the kernels. It reads `work` for its sequences only, so that
how work was split can't matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase3_paged_attention.work_list import Work

NEW_TOKENS = 64  # that a mask of bits speaks of


def attend(
    q: Tensor,
    kv: tuple[Tensor, ...],
    tables: object,
    work: Work | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens to the cache that holds them, computed in float32, in float64 where q is.

    Arguments, shapes and the result are those of `kernels.paged.attend`; `work=None` means all sequences.
    """
    query_start, seq_lens, block_tables, visible = (
        getattr(tables, name) for name in ("query_start", "seq_lens", "block_tables", "visible")
    )
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values, *scales = kv
    k_scale, v_scale = scales or (None, None)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    wanted = range(len(seq_lens)) if work is None else sorted(set(work.items[:, 0].tolist()) - {-1})
    for b in wanted:
        rows = slice(int(query_start[b]), int(query_start[b + 1]))
        length = int(seq_lens[b])
        seen = visible_keys(
            rows.stop - rows.start, length, window, None if visible is None else visible[rows], q.device
        )
        k = gathered(keys, k_scale, block_tables[b], length, exact)  # [S, Hkv, D]
        v = gathered(values, v_scale, block_tables[b], length, exact)
        out[rows] = dense(q[rows].to(exact), k, v, seen, scale, soft_cap).to(q.dtype)
    return out.flatten(1)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """softmax(q k^T) v by head; 0 for a query that sees nothing.

    Args:
        q: [T, Hq, D].
        k, v: [S, Hkv, D].
        seen: [T, S] bool.
        scale, soft_cap: see `attend`.

    Returns:
        [T, Hq, D].
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [S, Hq, D]
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    weights = weights.masked_fill(~seen.any(-1)[:, None], 0.0)  # softmax of nothing is NaN
    return torch.einsum("hts,shd->thd", weights, v)


def visible_keys(
    new: int, length: int, window: int | None, bits: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Which of `length` tokens each of the last `new` may see, [new, length] bool.

    Args:
        new, length: tokens of the sequence.
        window: tokens that a query sees, itself included.
        bits: [new] int64, see `kernels.paged.Tables`.
        device: of the result.
    """
    position = torch.arange(length, device=device)
    own = position[length - new :, None]  # [new, 1]
    seen = position <= own
    if window is not None:
        seen &= position > own - window
    if bits is not None:
        j = position - (length - new)  # among the new tokens
        bit = (bits[:, None] >> j.clamp(0, NEW_TOKENS - 1)) & 1
        seen &= (j < 0) | (bits == -1)[:, None] | ((bit == 1) & (j < NEW_TOKENS))
    return seen


def gathered(side: Tensor, scale: Tensor | None, table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Keys or values of a sequence in the order of its tokens, [length, Hkv, D].

    Args:
        side: [blocks, P, Hkv, D], of any type.
        scale: None, [1] or [blocks, P, Hkv].
        table: [n], blocks of the sequence.
        length: tokens of the sequence.
        dtype: of the result.
    """
    page = side.shape[1]
    blocks = table[: -(-length // page)].long()
    found = side[blocks].flatten(0, 1)[:length].to(dtype)
    if scale is None:
        return found
    if scale.numel() == 1:
        return found * scale.to(dtype)
    return found * scale[blocks].flatten(0, 1)[:length, :, None].to(dtype)
