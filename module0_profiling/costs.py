"""What each operation of a decoder has to do: FLOPs, and the fewest bytes moved; attention is a file of its own.

FLOPs count a multiply-add as two, and an exp or a division as one. Bytes: each input read once, each output written
once; what a fused kernel keeps in registers or a cache is another operation's business. `dtype_bytes` is of one
activation. Letters: T rows (tokens), B sequences, Hq/Hkv query and key-value heads, D head dimension, E experts, k of
them for each token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from module0_profiling.number_formats import WeightFormat
from module0_profiling.roofline import Work


def linear(rows: int, d_in: int, d_out: int, dtype_bytes: float = 2, weights: WeightFormat | None = None) -> Work:
    """[rows, d_in] x [d_in, d_out]: 2 rows d_in d_out FLOPs; bytes of the weights with scales, the input, the output.

    `weights` None: stored like the activations. Not counted: a bias, widening of quantised weights, quantising x.
    """
    stored = d_in * d_out * dtype_bytes if weights is None else weights.bytes(d_in, d_out)
    return Work(2 * rows * d_in * d_out, stored + rows * (d_in + d_out) * dtype_bytes)


def batched_linear(
    rows: int, heads: int, d_in: int, d_out: int, dtype_bytes: float = 2, weights: WeightFormat | None = None
) -> Work:
    """One [d_in, d_out] matrix for each head: 2 rows heads d_in d_out FLOPs (MLA's absorbed products)."""
    return linear(rows, d_in, d_out, dtype_bytes, weights) * heads


def embedding(rows: int, hidden: int, dtype_bytes: float = 2) -> Work:
    """Gather one row of the table for each token: 2 T hidden elements moved, no FLOPs. Not counted: the token ids."""
    return Work(0, 2 * rows * hidden * dtype_bytes)


def norm(rows: int, hidden: int, dtype_bytes: float = 2, *, residual: bool = False) -> Work:
    """RMSNorm: square, add, scale, weight, 4 T hidden FLOPs, 2 passes over x and the weight.

    With `residual` also the addition before it (5 FLOPs, 4 passes): reads x and the residual, writes both.
    Not counted: the square root of each row.
    """
    elements = rows * hidden
    passes = 4 if residual else 2
    return Work((5 if residual else 4) * elements, (passes * elements + hidden) * dtype_bytes)


def rope(rows: int, heads: int, kv_heads: int, head_dim: int, dtype_bytes: float = 2) -> Work:
    """Rotate Q and K in place: 3 FLOPs an element (4 products and 2 sums a pair), each read and written.

    cos and sin [T, D/2] in float32 are read once. Not counted: computing them.
    """
    elements = rows * (heads + kv_heads) * head_dim
    return Work(3 * elements, 2 * elements * dtype_bytes + rows * head_dim * 4)


def kv_write(rows: int, kv_heads: int, head_dim: int, dtype_bytes: float = 2, kv_bytes: float | None = None) -> Work:
    """Copy new keys and values into the cache: 2 T Hkv D elements read, and written with `kv_bytes` each; no FLOPs.

    Not counted: slot numbers, scales of a quantised cache.
    """
    return Work(0, 2 * rows * kv_heads * head_dim * (dtype_bytes + (dtype_bytes if kv_bytes is None else kv_bytes)))


def silu_mul(rows: int, intermediate: int, dtype_bytes: float = 2) -> Work:
    """silu(gate) * up: exp, add, divide and two products an element (5 FLOPs); two reads and one write."""
    return Work(5 * rows * intermediate, 3 * rows * intermediate * dtype_bytes)


def sampling(rows: int, vocab: int, *, passes: int = 1) -> Work:
    """Choose one of V float32 logits a row: each pass reads them once, one FLOP each (greedy: one pass).

    Softmax by temperature takes 2 passes, top-k and top-p about 3 more. Not counted: what a sort moves, random numbers.
    """
    return Work(passes * rows * vocab, passes * rows * vocab * 4)


# Mixture of experts.


def distinct_experts(tokens: float, experts: int, top_k: int) -> float:
    """Expected number of different experts that T tokens touch: E (1 - (1 - k/E)^T), uniform independent choices.

    Real routers are not uniform: they touch fewer. For one token it is exactly k.
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)


def router(rows: int, hidden: int, experts: int, dtype_bytes: float = 2) -> Work:
    """Scores of E experts: a linear layer and a float32 softmax or sigmoid (5 T E FLOPs). Not counted: top-k."""
    return linear(rows, hidden, experts, dtype_bytes) + Work(5 * rows * experts, rows * experts * 8)


def experts(
    rows: int,
    hidden: int,
    intermediate: int,
    num_experts: int,
    top_k: int,
    dtype_bytes: float = 2,
    weights: WeightFormat | None = None,
) -> Work:
    """Gated MLPs of the chosen experts: 6 T k hidden I FLOPs; weights of the expected distinct experts are read once.

    Activations: each (token, expert) pair reads its row, writes gate and up, reads and writes I for silu_mul, reads I,
    writes hidden. Not counted: sorting by expert, padding, the weighted sum of the k outputs.
    """
    pairs, read = rows * top_k, distinct_experts(rows, num_experts, top_k)
    gate_up = linear(0, hidden, 2 * intermediate, dtype_bytes, weights)
    down = linear(0, intermediate, hidden, dtype_bytes, weights)
    moved = pairs * (2 * hidden + 6 * intermediate) * dtype_bytes
    return Work(
        6 * pairs * hidden * intermediate + 5 * pairs * intermediate, read * (gate_up.bytes + down.bytes) + moved
    )


# Between devices.


@dataclass(frozen=True)
class Comm:
    """Bytes that each device sends over its link, in one direction, while it receives as many."""

    bytes: float

    def seconds(self, bandwidth: float) -> float:
        """The floor of its time on a link of so many bytes/s one way. Not counted: latency, synchronisation."""
        return self.bytes / bandwidth


def all_reduce(elements: float, ranks: int, dtype_bytes: float = 2) -> Comm:
    """Sum over n devices: 2 (n-1)/n of the tensor, by ring or by reduce-scatter and all-gather (bandwidth-optimal)."""
    return Comm(2 * (ranks - 1) / ranks * elements * dtype_bytes)


def all_to_all(rows: int, hidden: int, top_k: int, ranks: int, dtype_bytes: float = 2) -> Comm:
    """Send each of this device's T tokens to its k experts, spread evenly: T k hidden (n-1)/n elements, one way.

    Dispatch and combine are two of them. Not counted: that a token may go once to a device that holds two of its
    experts, which saves up to half.
    """
    return Comm(rows * top_k * hidden * (ranks - 1) / ranks * dtype_bytes)
