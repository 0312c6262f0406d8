"""Are the cores that work together neighbours? What the memory gives them, and what handing a result over costs.

    python -m module0_profiling.core_distance [--samples 60]

Cores of one complex share its last cache and its link to the memory. Two on one complex hand results over quickly and
share one link; two on different complexes have a link each, and every result that passes between them crosses the chip.
On a machine of one's own the pair is chosen (`taskset`); a virtual machine's host may move them at any time, and a
benchmark sees both. Samples fall into two groups by the rate of all cores over that of one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from module0_profiling.device import Device, detect
from module0_profiling.peak_measure import buffer_bytes, read_bandwidth_now
from module0_profiling.results import Figure, record
from module0_profiling.timing import Crowd, interleave

COMMAND = "python -m module0_profiling.core_distance"
ROWS, WIDTH = 128, 640  # 160 KiB in bfloat16: in the cache of every core
LINKS = 1.4  # all cores read so many times faster than one: more than one link serves them
PAUSE = 1.0  # seconds between samples


@dataclass(frozen=True)
class Sample:
    """One look: bytes/s that one core and all cores read; seconds of an addition, by who wrote its input.

    Attributes:
        one, all: bytes/s.
        kept: the input was written by another addition, each core its own part.
        handed: the input was written by a matrix product, whose parts lie otherwise.
    """

    one: float
    all: float
    kept: float
    handed: float

    @property
    def apart(self) -> bool:
        """The cores have more than one link to the memory."""
        return self.all > LINKS * self.one


def sample(device: Device) -> Sample:
    """Takes about two seconds."""
    import torch

    one, every = read_of_one_core(device), read_bandwidth_now(device)
    x, y = (torch.randn(ROWS, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5
    with torch.inference_mode():
        times = {
            name: _after(fn, lambda z: z + y)
            for name, fn in {"kept": lambda: x + y, "handed": lambda: x @ weight}.items()
        }
    return Sample(one, every, **times)


def read_of_one_core(device: Device) -> float:
    """Bytes/s of a sum over a buffer that no cache holds, by one thread."""
    import torch

    threads, buffer = torch.get_num_threads(), torch.ones(buffer_bytes(device) // 4)
    try:
        torch.set_num_threads(1)
        return buffer.nbytes / interleave({"sum": buffer.sum}, rounds=5)["sum"].best
    finally:
        torch.set_num_threads(threads)


def _after(first: Callable[[], object], then: Callable[..., object], rounds: int = 400) -> float:
    """Seconds that `then` takes on what `first` has just written: timed inside, so that `first` costs nothing."""
    taken = []
    for _ in range(rounds):
        written = first()
        began = time.perf_counter()
        then(written)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def figures(samples: Iterable[Sample]) -> list[Figure]:
    """A row for each of the two groups that occurred, medians."""
    found: list[Figure] = []
    kept = list(samples)
    for name, group in (
        ("cores on one link", [s for s in kept if not s.apart]),
        ("cores on links of their own", [s for s in kept if s.apart]),
    ):
        if not group:
            continue
        found.append(Figure(f"{name}/samples", len(group), ""))
        for column, values, unit in (
            ("read by one core", [s.one / 1e9 for s in group], "GB/s"),
            ("read by all cores", [s.all / 1e9 for s in group], "GB/s"),
            ("addition, input kept", [s.kept * 1e6 for s in group], "us"),
            ("addition, input handed over", [s.handed * 1e6 for s in group], "us"),
        ):
            middle = statistics.median(values)
            found.append(Figure(f"{name}/{column}", middle, unit, (max(values) - min(values)) / middle))
    return found


def main() -> None:
    """Sample, print and record."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60, help="two to three seconds each (60)")
    options = parser.parse_args()
    console, device = Console(), detect("cpu")
    samples: list[Sample] = []
    crowded = 0
    while len(samples) < max(1, options.samples) and crowded < 3 * options.samples:
        crowd, last = Crowd(), sample(device)
        if crowd.crowded:
            crowded += 1
            continue
        samples.append(last)
        console.print(
            f"{len(samples):3d}  one core {last.one / 1e9:5.1f}  all {last.all / 1e9:5.1f} GB/s   "
            f"addition kept {last.kept * 1e6:5.1f}  handed over {last.handed * 1e6:5.1f} us",
            highlight=False,
        )
        time.sleep(PAUSE)
    if not samples:
        raise SystemExit(
            "other processes took the cores all the time: nothing was recorded, try again when it is quiet"
        )
    console.print(f"{crowded} samples were left out: other processes ran")
    path = record("module0", "cores", figures(samples), command=COMMAND, device="cpu")
    console.print(f"recorded in {path}")


if __name__ == "__main__":
    main()
