"""Compare the speed of functions in one run, side by side.

A time alone says little: machines differ, clocks drift, neighbours make noise. So every claim of speed in this project
is a ratio of two functions that took turns in one run (A B, B A, A B ...). Noise that is slower than one round hits
both alike and cancels in the per-round ratio. The order flips each round, so that neither always runs after the other.

A `Clock` is the seam for other ways to time: a function that runs a callable once and returns the seconds it took. On
CUDA there are two: events around a call with a cold cache (`cuda_clock`), and a replayed graph of several calls
(`graph_clock`), whose functions take their inputs in turns from `rotated`, so that no call finds its own in the cache.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

Clock = Callable[[Callable[[], object]], float]
"""Runs the callable once, waits for the device, and returns seconds."""

Input = TypeVar("Input")
NOTCH = 1.57  # x interquartile range / sqrt(n): half of a 95 % interval of a median (McGill, Tukey, Larsen, 1978)


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

    @property
    def relative_error(self) -> float:
        """Half of the 95 % interval of the median, over the median; infinite below 4 rounds."""
        if len(self.seconds) < 4 or self.median <= 0:
            return float("inf")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return NOTCH * (high - low) / len(self.seconds) ** 0.5 / self.median


def interleave(
    fns: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    relative_error: float | None = None,
    seconds: float = 30.0,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time each function once a round, in turns, and return a `Timing` per name.

    Args:
        fns: name -> function without arguments. Make its input random: zeros can run faster on a GPU.
        rounds: how often each is timed; at least 1, and 5 or more for a figure that is published.
        warmup: untimed calls of each function first (compilation, caches, lazy allocation).
        device: "cpu", "cuda", "cuda:1" or "mps": decides the clock, see `clock_for`.
        relative_error: go on after `rounds` until each `Timing.relative_error` is at most this; None: do not go on.
        seconds: but not beyond so many seconds of measuring.
        clock: another clock than the device's.

    Raises:
        ValueError: for no function, `rounds` < 1, `warmup` < 0, a limit that is not positive, or an unknown device.
    """
    if not fns:
        raise ValueError("interleave got no function to time: pass {name: function}")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, warmup={warmup}: rounds must be >= 1 and warmup >= 0")
    if seconds <= 0 or (relative_error is not None and relative_error <= 0):
        raise ValueError(f"relative_error={relative_error}, seconds={seconds}: both must be above 0")
    clock = clock or clock_for(device)
    for fn in fns.values():
        for _ in range(warmup):
            clock(fn)
    taken: dict[str, list[float]] = {name: [] for name in fns}
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one function's turn would be charged to it
    try:
        began, round_index = time.perf_counter(), 0
        while round_index < rounds or (
            relative_error is not None
            and time.perf_counter() - began < seconds
            and any(Timing(tuple(values)).relative_error > relative_error for values in taken.values())
        ):
            names = list(fns) if round_index % 2 == 0 else list(reversed(list(fns)))
            for name in names:
                taken[name].append(clock(fns[name]))
            round_index += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def rotated(fn: Callable[[Input], object], inputs: Sequence[Input]) -> Callable[[], object]:
    """`fn` of the next of the inputs at each call, from the first again after the last. Raises ValueError for none."""
    if not inputs:
        raise ValueError("rotated got no inputs: pass at least one")
    turn = cycle(inputs)
    return lambda: fn(next(turn))


class Crowd:
    """Whether other processes took this one's cores since it was made: a load average needs a minute to notice.

    Counts involuntary context switches of all threads. A process that is alone on its cores has tens a second; with two
    threads that wait for each other and one competitor, hundreds. Systems that do not count them are never crowded.
    """

    SWITCHES = 100  # a second

    def __init__(self) -> None:
        self._began, self._switches = time.perf_counter(), self._count()

    @property
    def crowded(self) -> bool:
        """Until now."""
        seconds = max(time.perf_counter() - self._began, 1e-3)
        return (self._count() - self._switches) / seconds > self.SWITCHES

    @staticmethod
    def _count() -> int:
        try:
            import resource
        except ImportError:  # not a Unix
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


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


def graph_clock(device: str, calls: int = 10) -> Clock:
    """A clock that captures `calls` calls of a function in a CUDA graph, replays it, and returns the seconds of one.

    The host's part vanishes: what is left is what an engine pays that replays its steps. Make the inputs `rotated` and
    together larger than the L2 cache; with one input, later calls read it from there. A function is captured at its
    first use and kept as long as the clock.
    """
    import torch

    graphs: dict[Callable[[], object], torch.cuda.CUDAGraph] = {}

    def clock(fn: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            if fn not in graphs:
                fn()  # whatever happens once only must not be captured
                torch.cuda.synchronize()
                graphs[fn] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[fn]):
                    for _ in range(calls):
                        fn()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[fn].replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / calls  # milliseconds

    return clock
