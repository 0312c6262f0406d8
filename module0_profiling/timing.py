"""Compare the speed of functions in one run, side by side.

A time alone says little: machines differ, clocks drift, neighbours make noise. So every claim of speed in this project
is a ratio of two functions that took turns in one run (A B, B A, A B ...). Noise that is slower than one round hits
both alike and cancels in the per-round ratio. The order flips each round, so that neither always runs after the other.

A `Clock` is the seam for other ways to time (a replayed CUDA graph, rotated buffers): a function that runs a callable
once and returns the seconds it took.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[Callable[[], object]], float]
"""Runs the callable once, waits for the device, and returns seconds."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one function, one entry a round, in the order of the rounds."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a Timing needs at least one round: got none")

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Shortest seconds per call: what the machine can do when nothing disturbs it."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """(max - min) / median of the rounds: 0.1 means that they agree within 10 %."""
        return (max(self.seconds) - min(self.seconds)) / self.median if self.median > 0 else 0.0


def interleave(
    fns: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Time each function once a round, in turns, and return a `Timing` per name.

    Args:
        fns: name -> function without arguments. Make its input random: zeros can run faster on a GPU.
        rounds: how often each is timed; at least 1, and 5 or more for a figure that is published.
        warmup: untimed calls of each function first (compilation, caches, lazy allocation).
        device: "cpu", "cuda", "cuda:1" or "mps": decides the clock, see `clock_for`.

    Raises:
        ValueError: for no function, `rounds` < 1, `warmup` < 0 or an unknown device.
    """
    if not fns:
        raise ValueError("interleave got no function to time: pass {name: function}")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, warmup={warmup}: rounds must be >= 1 and warmup >= 0")
    clock = clock_for(device)
    for fn in fns.values():
        for _ in range(warmup):
            clock(fn)
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one function's turn would be charged to it
    try:
        for round_index in range(rounds):
            names = list(fns) if round_index % 2 == 0 else list(reversed(list(fns)))
            for name in names:
                seconds[name].append(clock(fns[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times longer `slow` takes than `fast`: the median of the ratios of each round.

    Raises:
        ValueError: if the two have different numbers of rounds (they were not timed together), or a time is zero.
    """
    if len(slow.seconds) != len(fast.seconds):
        raise ValueError(f"{len(slow.seconds)} and {len(fast.seconds)} rounds: time both in one call of interleave()")
    if min(fast.seconds) <= 0:
        raise ValueError("a round took 0 s: the function is too short for this clock, repeat its work inside it")
    return statistics.median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True))


def clock_for(device: str) -> Clock:
    """The clock of a device: wall time on a CPU, events around a cold-cache run on CUDA, synchronised wall on MPS.

    Raises:
        ValueError: for a device that is none of these.
    """
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return wall_clock
    if kind == "cuda":
        return cuda_clock(str(device))
    if kind == "mps":
        return mps_clock
    raise ValueError(f"device {str(device)!r} has no clock: use cpu, cuda, cuda:<n> or mps")


def wall_clock(fn: Callable[[], object]) -> float:
    """Seconds of wall time that `fn` takes."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def mps_clock(fn: Callable[[], object]) -> float:
    """Seconds until Apple's GPU has finished what `fn` queued."""
    import torch

    torch.mps.synchronize()
    start = time.perf_counter()
    fn()
    torch.mps.synchronize()
    return time.perf_counter() - start


def cuda_clock(device: str) -> Clock:
    """A clock of CUDA events on `device`, with its L2 cache flushed before each run.

    The flush writes twice the L2's size, and at least 256 MiB. It keeps the GPU busy while the host queues `fn`: about
    60 us at 4.5 TB/s. What takes longer to queue (a chain of eager operators), or synchronises inside, is charged for
    it: capture it in a CUDA graph first.
    """
    import torch

    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)
    scratch = torch.empty(max(2 * l2_bytes, 256 << 20), dtype=torch.uint8, device=device)

    def clock(fn: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            scratch.zero_()
            start.record()
            fn()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3  # milliseconds

    return clock
