"""The roofline: what bounds an operation, and how fast it could be at best.

An operation does `flops` of arithmetic and must move at least `bytes`. A machine does so many FLOP/s and so many
bytes/s. Whichever takes longer is the floor of its time (Williams, Waterman, Patterson: "Roofline", CACM 2009). Bytes
are the fewest possible: each input read once, each output written once. Letters: T tokens, B sequences, Hq/Hkv query
and key-value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from module0_profiling.hardware import Peaks
    from module0_profiling.results import Figure


@dataclass(frozen=True)
class Work:
    """What an operation has to do: floating-point operations (a multiply-add is two) and bytes of memory traffic."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP/byte; infinite when nothing is moved."""
        return self.flops / self.bytes if self.bytes else float("inf")

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Roof:
    """A machine's two ceilings for one dtype: `flops` in FLOP/s and `bandwidth` in bytes/s."""

    flops: float
    bandwidth: float
    name: str = ""

    @property
    def ridge(self) -> float:
        """The intensity in FLOP/byte at which the two ceilings meet: below it memory bounds, above it arithmetic."""
        return self.flops / self.bandwidth

    def attainable(self, work: Work) -> float:
        """FLOP/s that the work can reach at best: min(peak, intensity x bandwidth)."""
        return min(self.flops, work.intensity * self.bandwidth)

    def seconds(self, work: Work) -> float:
        """The floor of the work's time in seconds."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)

    def bound_by(self, work: Work) -> str:
        """ "memory" or "compute": which ceiling sets the floor."""
        return "memory" if work.intensity < self.ridge else "compute"


@dataclass(frozen=True)
class Point:
    """A measured kernel on the plot: `intensity` in FLOP/byte and `performance` in FLOP/s."""

    label: str
    intensity: float
    performance: float

    @classmethod
    def measured(cls, label: str, work: Work, seconds: float) -> Point:
        """The point of some work that took so many seconds."""
        return cls(label, work.intensity, work.flops / seconds)


@dataclass(frozen=True)
class Dims:
    """The sizes of a dense decoder: what a cost needs to know of a model's config.

    `dtype_bytes` is per activation and cached key or value, `weight_bytes` per weight (0.5 for INT4; default the same).
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype_bytes: float = 2
    weight_bytes: float | None = None


# One operation each.


def linear(rows: int, d_in: int, d_out: int, dtype_bytes: float = 2, weight_bytes: float | None = None) -> Work:
    """[rows, d_in] x [d_in, d_out]: reads input and weights, writes the output."""
    weights = d_in * d_out * (dtype_bytes if weight_bytes is None else weight_bytes)
    return Work(2 * rows * d_in * d_out, weights + rows * (d_in + d_out) * dtype_bytes)


def attention_decode(
    batch: int, context: int, heads: int, kv_heads: int, head_dim: int, dtype_bytes: float = 2
) -> Work:
    """One query token for each of `batch` sequences over `context` cached positions, itself included."""
    return attention_prefill(batch, 1, heads, kv_heads, head_dim, dtype_bytes, prefix=context - 1)


def attention_prefill(
    batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype_bytes: float = 2, *, prefix: int = 0
) -> Work:
    """Causal attention of `tokens` new queries over `prefix` earlier positions and themselves, for each sequence.

    Query i sees prefix + i + 1 positions; Q.K and P.V are 2 D FLOPs each per head. The softmax is not counted: it is
    small beside them, and the convention of the papers. K and V are read once, Q once, and the output is written.
    """
    pairs = tokens * prefix + tokens * (tokens + 1) // 2
    flops = 4 * batch * heads * head_dim * pairs
    moved = 2 * tokens * heads * head_dim + 2 * (prefix + tokens) * kv_heads * head_dim
    return Work(flops, batch * moved * dtype_bytes)


def kv_write(rows: int, kv_heads: int, head_dim: int, dtype_bytes: float = 2) -> Work:
    """Copy the new keys and values of `rows` tokens into the cache."""
    return Work(0, 2 * 2 * rows * kv_heads * head_dim * dtype_bytes)


def rope(rows: int, heads: int, kv_heads: int, head_dim: int, dtype_bytes: float = 2) -> Work:
    """Rotate Q and K: 4 multiplications and 2 additions a pair; cos and sin [rows, D/2] in float32 are read once."""
    elements = rows * (heads + kv_heads) * head_dim
    return Work(3 * elements, 2 * elements * dtype_bytes + rows * head_dim * 4)


def norm(rows: int, hidden: int, dtype_bytes: float = 2, *, residual: bool = False) -> Work:
    """RMSNorm: square, add, scale, weight; with `residual` also the addition before it, whose sum is written back."""
    elements = rows * hidden
    passes = 4 if residual else 2
    return Work((5 if residual else 4) * elements, (passes * elements + hidden) * dtype_bytes)


def silu_mul(rows: int, intermediate: int, dtype_bytes: float = 2) -> Work:
    """silu(gate) * up: exp, add, divide and two products an element; two reads and one write."""
    return Work(5 * rows * intermediate, 3 * rows * intermediate * dtype_bytes)


def embedding(rows: int, hidden: int, dtype_bytes: float = 2) -> Work:
    """Gather one row of the table for each token."""
    return Work(0, 2 * rows * hidden * dtype_bytes)


# A whole step.


def decode_step(dims: Dims, batch: int, context: int) -> list[tuple[str, Work]]:
    """The work of one token for each of `batch` sequences, whose caches then hold `context` positions, by operation."""
    return step(dims, batch, tokens=1, prefix=context - 1)


def prefill_step(dims: Dims, batch: int, tokens: int) -> list[tuple[str, Work]]:
    """The work of reading `batch` prompts of `tokens` tokens; logits for the last token of each."""
    return step(dims, batch, tokens=tokens, prefix=0)


def step(dims: Dims, batch: int, tokens: int, prefix: int) -> list[tuple[str, Work]]:
    """The work of one forward pass by operation, summed over the layers, in the order in which they run.

    Norms carry the residual addition except the first. Query, key and value share one matrix, as do gate and up.
    """
    rows, size = batch * tokens, dims.dtype_bytes
    q_width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim

    def matrix(d_in: int, d_out: int, count: int = rows) -> Work:
        return linear(count, d_in, d_out, size, dims.weight_bytes)

    attention = attention_prefill(batch, tokens, dims.heads, dims.kv_heads, dims.head_dim, size, prefix=prefix)
    norms = norm(rows, dims.hidden, size) + norm(rows, dims.hidden, size, residual=True) * (2 * dims.layers)
    layer = {
        "qkv": matrix(dims.hidden, q_width + 2 * kv_width),
        "rope": rope(rows, dims.heads, dims.kv_heads, dims.head_dim, size),
        "kv_write": kv_write(rows, dims.kv_heads, dims.head_dim, size),
        "attention": attention,
        "o_proj": matrix(q_width, dims.hidden),
        "gate_up": matrix(dims.hidden, 2 * dims.intermediate),
        "silu_mul": silu_mul(rows, dims.intermediate, size),
        "down": matrix(dims.intermediate, dims.hidden),
    }
    return [
        ("embedding", embedding(rows, dims.hidden, size)),
        ("norms", norms),
        *((name, work * dims.layers) for name, work in layer.items()),
        ("lm_head", matrix(dims.hidden, dims.vocab, batch)),
    ]


def total(works: Iterable[tuple[str, Work]]) -> Work:
    """All of a step's work as one."""
    return sum((work for _, work in works), Work(0, 0))


def step_seconds(works: Iterable[tuple[str, Work]], roof: Roof) -> float:
    """The floor of a step in seconds: operations run one after the other, so their floors add up."""
    return sum(roof.seconds(work) for _, work in works)


# On paper.


def plot(points: Iterable[Point], peaks: Peaks, path: Path, *, title: str = "") -> tuple[Path, Path]:
    """Draw the ceilings of a machine and measured points, log-log, to `path` with .svg and .png; returns both paths."""
    from module0_profiling.plots import roofline_plot

    roofs = [peaks.roof(dtype) for dtype in peaks.matmul]
    return roofline_plot(list(points), roofs, path, title=title)


def to_figures(points: Iterable[Point], peaks: Peaks) -> tuple[Figure, ...]:
    """Points and ceilings as figures for `results.record`; `{{ plot:<name> kind=roofline }}` draws them (report.py)."""
    from module0_profiling.results import Figure

    rows = [("roof bandwidth/bytes/s", peaks.read_bandwidth, "bytes/s")]
    rows += [(f"roof {dtype}/FLOP/s", rate, "FLOP/s") for dtype, rate in peaks.matmul.items()]
    for point in points:
        rows.append((f"{point.label}/FLOP/byte", point.intensity, "FLOP/byte"))
        rows.append((f"{point.label}/FLOP/s", point.performance, "FLOP/s"))
    return tuple(Figure(name, value, unit) for name, value, unit in rows)


def from_figures(figures: Mapping[str, float]) -> tuple[list[Point], list[Roof]]:
    """The inverse of `to_figures`, from name -> value.

    Raises:
        KeyError: when the bandwidth is missing, or a point has no FLOP/s.
    """
    bandwidth = figures["roof bandwidth/bytes/s"]
    cut = len("/FLOP/byte")
    points = [
        Point(name[:-cut], value, figures[f"{name[:-cut]}/FLOP/s"])
        for name, value in figures.items()
        if name.endswith("/FLOP/byte")
    ]
    roofs = [
        Roof(value, bandwidth, name.removeprefix("roof ").removesuffix("/FLOP/s"))
        for name, value in figures.items()
        if name.startswith("roof ") and name.endswith("/FLOP/s")
    ]
    return points, roofs
