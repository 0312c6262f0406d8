"""Causal attention of a prompt or a chunk: matrix products over blocks of queries where they win, else torch's own.

Torch's flash attention for CPUs multiplies small tiles, far below the rate of a large matrix product, and the attention
of a long prompt is one: query heads that share a key head are rows of it. A block of queries multiplies only the keys
that its last query may see, so the work is that of the triangle, not of the square.

The precision is chosen product by product. Queries times keys run in float32: a CPU product of bfloat16 returns
bfloat16, and a score of 40 rounded to 8 bits is off by up to 0.125, which is 13 % of a probability. Probabilities times
values run in bfloat16 at twice the rate, as in flash attention: rounding a probability costs it 0.4 % at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

LONGEST_BLOCK = 64  # queries: more multiply keys that are masked anyway, fewer are too few rows for the product
SHORTEST_BLOCK = 16
SCORES = 2 << 20  # numbers in a block of scores: 8 MiB stay in a shared cache from the product to the softmax
LEAST_WORK = 32 << 20  # FLOP of all queries with all keys: below, one call costs less than the operations of a block


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention of the last tokens of a sequence over all of it, by the faster of the two ways.

    Args:
        q: [Tq, Hq, D], the last Tq tokens of the sequence, rotated.
        k, v: [Tk, Hkv, D] and [Tk, Hkv, Dv], Tk >= Tq; Hq is a multiple of Hkv.
        scale: of the scores, 1 / sqrt(D) as a rule.
        window: tokens that a query sees, itself included; None: all.
        mask: what `causal_mask` gives for these arguments, where layers share one; absent, it is made if needed.

    Returns:
        [Tq, Hq, Dv] in q's dtype.
    """
    tokens, length = q.shape[0], k.shape[0]
    seen = length if window is None else min(length, tokens - 1 + window)
    if 4 * q.numel() * seen >= LEAST_WORK and not why_not_blocks(q.dtype, q.device):
        return attention_in_blocks(q, k, v, scale, window)
    if mask is None:
        mask = causal_mask(tokens, length, window, q.device)
    return _by_torch(q, k, v, scale, mask)


def why_not_blocks(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Reasons why `attention_in_blocks` would not be the faster one here."""
    if device.type != "cpu":
        return [f"products over blocks are for CPUs, not {device.type}"]
    if dtype != torch.bfloat16:
        return [f"probabilities in bfloat16 would make {dtype} less exact"]
    if not hasattr(torch.cpu, "get_capabilities"):
        return [f"torch {torch.__version__} doesn't say which instructions this CPU has"]
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16", False):
        return ["torch's flash attention uses this CPU's AMX tiles, float32 products can't"]
    return [] if has.get("avx512_bf16", False) else ["this CPU multiplies bfloat16 no faster than float32"]


def attention_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, block: int | None = None
) -> Tensor:
    """`causal_attention` as matrix products: scores and softmax in float32, probabilities and values in v's dtype.

    Per block of Bq queries: 2 · Hq · Bq · keys · D FLOP for the scores and the same for the values, and
    6 · Hq · Bq · keys bytes of scores and probabilities, which are used again for every block.

    Args:
        q, k, v, scale, window: as for `causal_attention`.
        block: queries in a block; by default as many as leave the scores in the cache.
    """
    tokens, hq = q.shape[:2]
    if window is not None:  # what not even the first query sees
        k, v = (x[max(0, x.shape[0] - tokens + 1 - window) :] for x in (k, v))
    length, hkv = k.shape[:2]
    first = length - tokens  # place of the first query among the keys
    block = min(tokens, block or _block_size(hq, length))
    widest = length if window is None else min(length, window - 1 + block)

    queries = q.unflatten(1, (hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, G, Tq, D]
    keys = k.to(torch.float32, copy=True).mul_(scale).permute(1, 2, 0)  # [Hkv, D, Tk]
    values = v.transpose(0, 1).contiguous()  # [Hkv, Tk, D]
    out = q.new_empty(tokens, hq, v.shape[-1])
    out_by_head = out.unflatten(1, (hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, G, Tq, D]
    all_scores = torch.empty(hq * block * widest, device=q.device)
    all_weights = torch.empty(hq * block * widest, dtype=v.dtype, device=q.device)
    above, below = _triangles(block, q.device)

    for start in range(0, tokens, block):
        rows = min(block, tokens - start)
        position = first + start  # of the block's first query
        low = 0 if window is None else max(0, position + 1 - window)
        high = position + rows
        shape = (hkv, hq // hkv * rows, high - low)
        scores, weights = (x[: math.prod(shape)].view(shape) for x in (all_scores, all_weights))
        torch.bmm(queries[:, :, start : start + rows].float().flatten(1, 2), keys[:, :, low:high], out=scores)
        by_query = scores.unflatten(1, (-1, rows))  # [Hkv, G, Bq, keys]
        by_query[..., position - low :].add_(above[:rows, :rows])  # the block's own tokens come last
        if window is not None and (whole := low + window - position) < rows:  # queries before `whole` see key `low`
            late = rows - whole
            by_query[..., whole:, :late].add_(below[:late, :late])
        torch.softmax(scores, -1, out=scores)
        weights.copy_(scores)
        attended = torch.bmm(weights, values[:, low:high])  # [Hkv, G * Bq, D]
        out_by_head[:, :, start : start + rows] = attended.unflatten(1, (-1, rows))
    return out


def causal_mask(tokens: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[tokens, length] bool, true where a query that is among the last `tokens` may read a key.

    None where that is the plain triangle, which attention knows by itself.
    """
    if tokens == length and (window is None or length <= window):
        return None
    query = torch.arange(length - tokens, length, device=device).unsqueeze(1)
    key = torch.arange(length, device=device)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def _by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    width = v.shape[-1]
    if width != q.shape[-1]:  # flash attention wants one width
        widest = max(width, q.shape[-1])
        q, k, v = (pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    out = sdpa(
        q.transpose(0, 1).unsqueeze(0),  # [1, Hq, Tq, D]
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0, ..., :width].transpose(0, 1)


def _block_size(heads: int, length: int) -> int:
    """The multiple of `SHORTEST_BLOCK` whose scores stay in the cache, up to `LONGEST_BLOCK`."""
    fits = SCORES // (heads * length)
    return min(LONGEST_BLOCK, max(SHORTEST_BLOCK, fits // SHORTEST_BLOCK * SHORTEST_BLOCK))


def _triangles(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two of [size, size] float32: -inf above the diagonal, 0 else; -inf on the diagonal and below it, 0 else."""
    minus_infinity = torch.full((size, size), -torch.inf, device=device)
    return minus_infinity.triu(1), minus_infinity.tril()
