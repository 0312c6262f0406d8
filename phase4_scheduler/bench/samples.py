"""What a load test keeps: a sample for each request, and all of them with how they were taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

INTERRUPTED = "interrupted"


@dataclass(slots=True)
class Sample:
    """One request. Times are seconds from the start of the load.

    Attributes:
        wanted_tokens: of the answer, as asked for.
        scheduled: when it was to be sent.
        sent: when it was sent for the first time.
        times: when each chunk that carries tokens came.
        ended: when the answer was complete, or given up.
        status: of the last answer; 0 if there was none.
        refusals: statuses (429, 503) of the answers after which it was sent again.
        prompt_tokens, output_tokens: as the server counted them.
        finish_reason: as the server said.
        error: what went wrong; None: nothing.
    """

    wanted_tokens: int
    scheduled: float
    sent: float
    times: list[float] = field(default_factory=list)
    ended: float | None = None
    status: int = 0
    refusals: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether all of the answer came."""
        return self.ended is not None and self.error is None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token; the waiting between refusals is part of it."""
        return self.times[0] - self.sent if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks: the inter-token latency that a reader sees."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first, on average; None when there is none."""
        if len(self.times) < 2 or self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float | None:
        """Seconds from sending to the end of the answer."""
        return None if self.ended is None else self.ended - self.sent


@dataclass(frozen=True)
class LoadResult:
    """A load and what came of it.

    Attributes:
        config: what was asked of which server, as plain data.
        samples: in the order in which they were sent.
        began: seconds since 1970.
        duration: seconds from the first request to the end of the last.
        open_loop: whether requests had times of their own.
        cpu_seconds: that this process used meanwhile; near `duration` the client is what was measured.
        interrupted: whether it was ended early: what was in flight then has the error "interrupted".
    """

    config: dict[str, Any]
    samples: tuple[Sample, ...]
    began: float
    duration: float
    cpu_seconds: float
    open_loop: bool = False
    interrupted: bool = False

    def columns(self) -> dict[str, list[Any]]:
        """The samples as arrays, one entry for each request, in microseconds' precision."""
        return {
            "scheduled": [_micro(s.scheduled) for s in self.samples],
            "sent": [_micro(s.sent) for s in self.samples],
            "ended": [_micro(s.ended) for s in self.samples],
            "ttft": [_micro(s.ttft) for s in self.samples],
            "itl": [[_micro(gap) for gap in s.gaps] for s in self.samples],
            "status": [s.status for s in self.samples],
            "refusals": [s.refusals for s in self.samples],
            "prompt_tokens": [s.prompt_tokens for s in self.samples],
            "output_tokens": [s.output_tokens for s in self.samples],
            "wanted_tokens": [s.wanted_tokens for s in self.samples],
            "finish_reason": [s.finish_reason for s in self.samples],
            "error": [s.error for s in self.samples],
        }


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
