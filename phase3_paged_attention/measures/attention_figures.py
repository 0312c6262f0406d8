"""Figures of a timed step of attention: rates beside what the device reaches in the same run, ratios to the peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from module0_profiling.results import Figure
from module0_profiling.timing import clock_for
from phase3_paged_attention.measures.attention_timing import OURS, Timed


@dataclass(frozen=True)
class Rates:
    """Of one device, in the same run: bytes a second read, and read plus written; FLOPs a second."""

    read: float
    copy: float
    matmul: float

    @staticmethod
    def now(device: str, *, dry: bool = False) -> Rates:
        """Measure them: about 2 s on a GPU."""
        from module0_profiling.peak_measure import copy_bandwidth, matmul_rate, read_bandwidth

        clock = clock_for(device)
        seconds = 0.01 if dry else 0.5
        buffer = torch.randn((1 << 19) if dry else (1 << 30), device=device, dtype=torch.bfloat16)
        read, copy = read_bandwidth(buffer, clock, seconds)[0], copy_bandwidth(buffer, clock, seconds)
        return Rates(max(read, copy), copy, matmul_rate("float16" if dry else "bfloat16", device, clock, seconds))

    @property
    def figures(self) -> list[Figure]:
        """The peaks, for the table."""
        sides = (("read", self.read), ("copy", self.copy))
        peaks = [Figure(f"peaks/{name}", rate / 1e9, "GB/s") for name, rate in sides]
        return [*peaks, Figure("peaks/matmul", self.matmul / 1e12, "TFLOP/s")]


def figures_of(found: Timed, rates: Rates, *, both: bool = False) -> list[Figure]:
    """Time and rate of each subject, share of the peak that bounds the case, ratios of the peers to ours.

    Args:
        found: of a case.
        rates: of the device, in the same run.
        both: bytes and FLOPs; else those that bound the case.
    """
    case, figures = found.case, []
    by_memory = case.bytes / rates.read > case.flops / rates.matmul
    for name, timing in found.timings.items():
        figures.append(Figure(f"{case}/{name}, time", timing.median * 1e6, "us", timing.spread))
        if by_memory or both:
            rate = case.bytes / timing.median
            figures.append(Figure(f"{case}/{name}, bandwidth", rate / 1e9, "GB/s", timing.spread))
            figures.append(Figure(f"{case}/{name}, share of read", 100 * rate / rates.read, "%"))
        if not by_memory or both:
            rate = case.flops / timing.median
            figures.append(Figure(f"{case}/{name}, rate", rate / 1e12, "TFLOP/s", timing.spread))
            figures.append(Figure(f"{case}/{name}, share of matmul", 100 * rate / rates.matmul, "%"))
        if OURS in found.timings and name != OURS:
            figures.append(Figure(f"{case}/{OURS} over {name}", found.over(name), "x"))
    if OURS in found.timings and (best := found.best()) is not None:
        figures.append(Figure(f"{case}/{OURS} over the best FlashInfer", found.over(best), "x", note=best))
    return figures


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios. Raises ValueError for none."""
    if not values:
        raise ValueError("nothing was measured: no ratio has a mean")
    return math.exp(sum(map(math.log, values)) / len(values))


def plan_figures(found: Timed) -> list[Figure]:
    """What planning the step costs the host."""
    note = f"of the host, {found.case}"
    return [Figure(f"plan/{name}", 1e6 * seconds, "us", note=note) for name, seconds in found.plans.items()]
