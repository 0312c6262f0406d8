"""The roofline: what bounds an operation, and how fast it could be at best.

An operation does `flops` of arithmetic and must move at least `bytes`. A machine does so many FLOP/s and so many
bytes/s. Whichever takes longer is the floor of its time (Williams, Waterman, Patterson: "Roofline", CACM 2009). What
each operation of a decoder has to do is in `costs.py` and `attention_costs.py`, what a model's step has in
`model_costs.py`.
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
