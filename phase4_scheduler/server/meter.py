"""What the last seconds were like: rates from the engine's counters, percentiles from the requests' times."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from phase4_scheduler.core.wire import Stats

WINDOW = 10.0  # seconds that rates look back
KEPT = 4096  # newest times that percentiles are of
_COUNTERS = (
    "steps",
    "busy_seconds",
    "elapsed_seconds",
    "prompt_tokens",
    "generated_tokens",
    "preemptions",
    "recomputed_tokens",
    "batch_seqs",
    "batch_tokens",
)


@dataclass
class Totals:
    """The engine's counters (see `wire.Stats`), added up over its restarts."""

    steps: float = 0
    busy_seconds: float = 0
    elapsed_seconds: float = 0
    prompt_tokens: float = 0
    generated_tokens: float = 0
    preemptions: float = 0
    recomputed_tokens: float = 0
    batch_seqs: float = 0
    batch_tokens: float = 0
    finished: float = 0

    def minus(self, other: Totals) -> Totals:
        """What was added since."""
        return Totals(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class Newest:
    """The newest of many numbers, in memory that is taken once: floats that are kept, one here and one there among
    those that are not, hold the pages of all.

    Args:
        size: how many at most.
    """

    def __init__(self, size: int) -> None:
        self._values = array("d", bytes(8 * size))
        self._count = 0

    def append(self, value: float) -> None:
        """Take one, in place of the oldest."""
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def __len__(self) -> int:
        return min(self._count, len(self._values))

    def __iter__(self) -> Iterator[float]:
        return iter(self._values[: len(self)])


class Meter:
    """Samples of the counters, about one a second, and times of requests.

    Attributes:
        totals: now.
        ttft, itl: newest times to the first token and between chunks, in seconds.
    """

    def __init__(self) -> None:
        self.totals = Totals()
        self.ttft, self.itl = Newest(KEPT), Newest(KEPT)
        self._last = Stats()
        self._samples: deque[tuple[float, Totals]] = deque([(-math.inf, Totals())])

    def sample(self, now: float, stats: Stats, finished: int) -> None:
        """Take the engine's newest counters. One that is lower than before belongs to a new engine.

        Args:
            now: seconds of a monotonic clock.
            stats: of the engine.
            finished: requests that have ended since the server started.
        """
        is_new = stats.steps < self._last.steps or stats.elapsed_seconds < self._last.elapsed_seconds
        before = Stats() if is_new else self._last
        added = {name: getattr(self.totals, name) + getattr(stats, name) - getattr(before, name) for name in _COUNTERS}
        self.totals, self._last = Totals(**added, finished=finished), stats
        self._samples.append((now, self.totals))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()

    @property
    def window(self) -> tuple[float, Totals]:
        """Seconds that the samples span, and what was added in them."""
        (start, old), (end, new) = self._samples[0], self._samples[-1]
        if math.isinf(start):
            if len(self._samples) < 3:
                return 0.0, Totals()
            start, old = self._samples[1]
        return end - start, new.minus(old)

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and answers. Only while the engine worked: an idle one would not be slow."""
        _, added = self.window
        tokens = added.prompt_tokens + added.generated_tokens
        return tokens / added.busy_seconds if added.busy_seconds > 0 else 0.0

    def summary(self) -> dict[str, float]:
        """Rates and percentiles by name: per second, shares of one, seconds. NaN never: 0 where nothing happened."""
        seconds, added = self.window

        def per(value: float, by: float) -> float:
            return value / by if by > 0 else 0.0

        return {
            "qps": per(added.finished, seconds),
            "prompt_tokens_per_second": per(added.prompt_tokens, seconds),
            "generated_tokens_per_second": per(added.generated_tokens, seconds),
            "tokens_per_busy_second": self.tokens_per_second,
            "busy": min(1.0, per(added.busy_seconds, added.elapsed_seconds)),
            "batch_occupancy": per(added.batch_seqs, added.steps),
            "tokens_per_step": per(added.batch_tokens, added.steps),
            "preemptions_per_second": per(added.preemptions, seconds),
            "ttft_p50": percentile(self.ttft, 0.5),
            "ttft_p99": percentile(self.ttft, 0.99),
            "itl_p50": percentile(self.itl, 0.5),
            "itl_p99": percentile(self.itl, 0.99),
        }


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
