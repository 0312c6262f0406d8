"""Rooflines of two GPUs from their datasheets, for the lesson: `python -m module0_profiling.lesson_plots`.

Nothing here is measured. A point lies where its operation would be if it reached its ceiling; what a machine really
reaches is the business of `titan peaks` and of the benchmarks. bfloat16 throughout.

Sources: "NVIDIA Ada GPU Architecture" whitepaper (RTX 4090: 1008 GB/s; dense tensor rate with float32 sums), NVIDIA's
H200 datasheet (its tensor rates are with sparsity; dense is half of that). Shared memory moves 128 bytes a clock and SM
(CUDA C++ Programming Guide: 32 banks of 4 bytes), at the clock that the rated FLOP/s imply. NVIDIA publishes no
bandwidth of the L2 for either, so there is no slope of it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from module0_profiling import attention_costs, costs, plots
from module0_profiling.results import REPOSITORY
from module0_profiling.roofline import Point, Roof, Work

BANKS = 128  # bytes that the shared memory of an SM moves in a clock


@dataclass(frozen=True)
class Datasheet:
    """What a datasheet says: bytes/s, FLOP/s by dtype, SMs, and the clock in Hz that the FLOP/s are rated at."""

    name: str
    bandwidth: float
    flops: dict[str, float]
    sms: int
    clock: float

    @property
    def roofs(self) -> list[Roof]:
        """A roof for each dtype."""
        return [Roof(flops, self.bandwidth, dtype) for dtype, flops in self.flops.items()]

    @property
    def levels(self) -> list[tuple[str, float]]:
        """The faster levels of the memory whose bandwidth is known."""
        return [("shared memory", self.sms * BANKS * self.clock)]


RTX_4090 = Datasheet("RTX 4090", 1008e9, {"bfloat16": 165.2e12, "float32": 82.6e12}, sms=128, clock=2.52e9)
H200 = Datasheet("H200", 4.8e12, {"float8": 1979e12, "bfloat16": 989.5e12}, sms=132, clock=1.83e9)


def operations() -> dict[str, Work]:
    """The operations of the lesson; attention has 64 query heads, 8 to a key-value head, of 128."""
    works = {f"linear, {rows} row{'s' * (rows > 1)}": costs.linear(rows, 4096, 4096) for rows in (1, 32, 256, 2048)}
    works["attention decode, 4k"] = attention_costs.attention_decode(1, 4096, heads=64, kv_heads=8, head_dim=128)
    works["attention prefill, 4k"] = attention_costs.attention_prefill(1, 4096, heads=64, kv_heads=8, head_dim=128)
    return works


def draw(sheet: Datasheet, folder: Path) -> tuple[Path, Path]:
    """Draw one GPU's roofline; returns the paths of the SVG and the PNG."""
    roof = Roof(sheet.flops["bfloat16"], sheet.bandwidth)
    points = [Point(name, work.intensity, roof.attainable(work)) for name, work in operations().items()]
    stem = f"lesson-roofline-{sheet.name.lower().replace(' ', '-')}"
    title = f"{sheet.name}: the datasheet's ceilings (nothing measured)"
    digest = plots.digest_of((sheet, points))
    return plots.roofline_plot(points, sheet.roofs, folder / stem, title=title, digest=digest, levels=sheet.levels)


def main() -> None:
    """Draw both into reports/figures, or into another folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "reports" / "figures")
    args = parser.parse_args()
    for sheet in (RTX_4090, H200):
        for path in draw(sheet, args.out):
            print(path)


if __name__ == "__main__":
    main()
