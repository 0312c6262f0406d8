"""What attention has to do: FLOPs and the fewest bytes, for MHA, GQA and MQA (Hkv = Hq, fewer, 1), and MLA.

Q.K and P.V are a multiply-add for each number of a head: with head dimensions a and b, 2a + 2b FLOPs for a pair of
query and visible key and head. The softmax is not counted: it is small beside them, and the papers leave it out. Scores
are not written to memory (a fused kernel). Letters as in `costs.py`; MLA: L latent, R rope, P nope, V value numbers.
"""

from __future__ import annotations

from module0_profiling.roofline import Work


def visible_pairs(tokens: int, prefix: int = 0, window: int | None = None) -> int:
    """Pairs of query and key under a causal mask: query i sees min(prefix + i + 1, window) positions, its own too."""
    full = tokens * prefix + tokens * (tokens + 1) // 2
    if window is None or prefix + tokens <= window:
        return full
    growing = max(0, min(tokens, window - prefix))  # queries that still see everything
    return growing * prefix + growing * (growing + 1) // 2 + (tokens - growing) * window


def cached_positions(tokens: int, prefix: int = 0, window: int | None = None) -> int:
    """Positions whose keys and values are read: all of prefix + tokens, or the window of the first query and on."""
    return prefix + tokens if window is None else min(prefix + tokens, window - 1 + tokens)


def attention_prefill(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype_bytes: float = 2,
    *,
    prefix: int = 0,
    window: int | None = None,
    kv_bytes: float | None = None,
) -> Work:
    """Causal attention of `tokens` new queries over `prefix` earlier positions and themselves, for each sequence.

    4 D FLOPs a visible pair and query head. Bytes: Q read, the output written, K and V of `cached_positions` read once
    with `kv_bytes` an element. With a prefix it is a chunk of a chunked prefill; with one token, a decode.
    """
    flops = 4 * batch * heads * head_dim * visible_pairs(tokens, prefix, window)
    cache = 2 * cached_positions(tokens, prefix, window) * kv_heads * head_dim
    queries = 2 * tokens * heads * head_dim * dtype_bytes
    return Work(flops, batch * (queries + cache * (dtype_bytes if kv_bytes is None else kv_bytes)))


def attention_decode(
    batch: int,
    context: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype_bytes: float = 2,
    *,
    window: int | None = None,
    kv_bytes: float | None = None,
) -> Work:
    """One query token for each of `batch` sequences over `context` cached positions, itself included."""
    return attention_prefill(
        batch, 1, heads, kv_heads, head_dim, dtype_bytes, prefix=context - 1, window=window, kv_bytes=kv_bytes
    )


def mla_absorbed(
    batch: int,
    tokens: int,
    heads: int,
    latent: int,
    rope: int,
    dtype_bytes: float = 2,
    *,
    prefix: int = 0,
    kv_bytes: float | None = None,
) -> Work:
    """MLA on the cached latents (DeepSeek-V2, arXiv 2405.04434): MQA with keys of L + R numbers and values of L.

    2 (L + R) + 2 L FLOPs a pair and head. Each position's L + R numbers are read once for all heads; queries [H, L + R]
    are read, outputs [H, L] written. Not counted here: the products with W_UK and W_UV (`costs.batched_linear`).
    """
    flops = batch * heads * visible_pairs(tokens, prefix) * (2 * (latent + rope) + 2 * latent)
    queries = tokens * heads * (2 * latent + rope) * dtype_bytes
    cache = (prefix + tokens) * (latent + rope) * (dtype_bytes if kv_bytes is None else kv_bytes)
    return Work(flops, batch * (queries + cache))


def mla_expanded(
    batch: int, tokens: int, heads: int, nope: int, rope: int, value: int, dtype_bytes: float = 2, *, prefix: int = 0
) -> Work:
    """MLA as multi-head attention on expanded keys and values: what a long prefill runs.

    2 (P + R) + 2 V FLOPs a pair and head. Expanded keys and values [H, P + V] and the shared rope key R of every
    position are read, Q [H, P + R] read, the output [H, V] written. Not counted here: expanding (`costs.linear` of
    every visible position by kv_b).
    """
    flops = batch * heads * visible_pairs(tokens, prefix) * (2 * (nope + rope) + 2 * value)
    moved = tokens * heads * (nope + rope + value) + (prefix + tokens) * (heads * (nope + value) + rope)
    return Work(flops, batch * moved * dtype_bytes)
