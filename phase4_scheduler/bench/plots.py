"""Three pictures of a load: how long first tokens took, how long further ones, and the throughput over time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from module0_profiling.plots import COLOURS, digest_of, save
from phase0_prototype.errors import UserError
from phase4_scheduler.bench.samples import LoadResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60


def draw(result: LoadResult, path: Path) -> tuple[Path, Path]:
    """Write the pictures as one SVG and one PNG beside `path`; returns their paths.

    Raises:
        UserError: nothing was answered, matplotlib is absent, or the place can't be written to.
    """
    done = [sample for sample in result.samples if sample.ok]
    if not any(sample.times for sample in done):
        raise UserError("--plot: no request was answered, so there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    drawing = Figure(figsize=(12, 3.8), layout="tight")
    FigureCanvasAgg(drawing)
    first, further, rate = drawing.subplots(1, 3)
    distribution(first, [s.ttft for s in done if s.ttft is not None], "time to first token")
    distribution(further, [gap for s in done for gap in s.gaps], "inter-token latency")
    throughput(rate, result)
    drawing.suptitle(f"{result.config['model']}: {result.config['workload']}\n{result.config['arrival']}", fontsize=9)
    try:
        return save(drawing, path, digest_of(result.columns()))
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror or error}; choose another place") from None


def distribution(axes: Axes, seconds: list[float], name: str) -> None:
    """The share of times below each value (an empirical distribution function) with p50, p90 and p99 marked."""
    axes.set(xlabel=f"{name}, ms", ylabel="share at most so long", ylim=(0, 1.02))
    axes.grid(True, alpha=0.3)
    if not seconds:
        axes.set_title("not measured", fontsize=8)
        return
    values = np.sort(np.asarray(seconds)) * 1e3
    axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=COLOURS[0])
    for share, colour in zip((0.5, 0.9, 0.99), COLOURS[1:], strict=False):
        at = float(np.percentile(values, 100 * share))
        axes.axvline(at, color=colour, linestyle="--", label=f"p{100 * share:.0f} {at:,.3g} ms")
    if values[-1] > 20 * max(float(np.median(values)), 1e-3):
        axes.set_xscale("symlog", linthresh=max(float(np.median(values)), 1e-3))
    axes.legend(fontsize=7, loc="lower right")


def throughput(axes: Axes, result: LoadResult) -> None:
    """Output tokens a second, in slices of the load's duration. The tokens of an answer are spread over its chunks."""
    edges, rates = tokens_over_time(result)
    axes.stairs(rates, edges, fill=True, color=COLOURS[2], alpha=0.6)
    axes.set(xlabel="seconds", ylabel="output tokens/s")
    axes.grid(True, alpha=0.3)


def tokens_over_time(result: LoadResult, bins: int = BINS) -> tuple[Any, Any]:
    """Edges of `bins` equal slices of the load in seconds, and the output tokens a second in each of them."""
    times: list[float] = []
    weights: list[float] = []
    for sample in result.samples:
        if sample.times:
            times += sample.times
            weights += [sample.output_tokens / len(sample.times)] * len(sample.times)
    longest = max(result.duration, max(times, default=0.0), math.ulp(1.0))
    counts, edges = np.histogram(times, bins=bins, range=(0.0, longest), weights=weights)
    return edges, counts / (longest / bins)
