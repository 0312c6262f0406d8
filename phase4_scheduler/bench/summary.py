"""What a load comes to: rates, percentiles, goodput, refusals, and whether the client itself was in the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from phase0_prototype.errors import UserError
from phase4_scheduler.bench.samples import LoadResult, Sample

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Slo:
    """What a user calls good (service level objectives), in seconds; None: it does not matter.

    Attributes:
        ttft: at most this to the first token.
        itl: at most this for each further token, on the average of the request (as in DistServe, arXiv 2401.09670).
    """

    ttft: float | None = None
    itl: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--slo-ttft", self.ttft), ("--slo-itl", self.itl)):
            if value is not None and not value > 0:
                raise UserError(f"{name} {value:g}: give a positive number of seconds")

    def met_by(self, sample: Sample) -> bool:
        """Whether a request was answered, and in time."""
        ttft, tpot = sample.ttft, sample.tpot
        return (
            sample.ok
            and (self.ttft is None or (ttft is not None and ttft <= self.ttft))
            and (self.itl is None or tpot is None or tpot <= self.itl)
        )


@dataclass(frozen=True)
class Spread:
    """How one time is distributed, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    largest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without values. Percentiles lie between neighbours (linear interpolation)."""
        if not values:
            return None
        array = np.asarray(values)
        p50, p90, p99 = np.percentile(array, PERCENTILES).tolist()
        return cls(float(array.mean()), p50, p90, p99, float(array.max()), len(values))


@dataclass(frozen=True)
class Summary:
    """Counts, rates (a second) and times of a load. Rates and times are those of answers that came whole.

    Attributes:
        completed, failed: requests.
        refused: answers of 429 and 503 by status, those after which the request was sent again too.
        errors: how often each error ended a request.
        short_answers: completed with fewer tokens than were asked for.
        prompt_tokens, output_tokens: of completed requests, as the server counted them.
        tokens_per_chunk: above 1 the inter-token latencies are those of groups of tokens.
        ttft, itl, tpot, e2e: to the first token; between chunks; for each token after the first; to the end.
        goodput: completed requests a second that met the objectives; None without objectives.
        client_busy: share of one core that this process used: near 1 the client was the bottleneck.
        sent_late: seconds by which a request was sent after its time, at worst. A closed loop has no times: 0.
    """

    duration: float
    completed: int
    failed: int
    refused: dict[str, int]
    errors: dict[str, int]
    short_answers: int
    prompt_tokens: int
    output_tokens: int
    request_rate: float
    output_rate: float
    total_rate: float
    tokens_per_chunk: float
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    goodput: float | None
    client_busy: float
    sent_late: float
    interrupted: bool

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def summarise(result: LoadResult, slo: Slo | None = None) -> Summary:
    """Count and average a load."""
    done = [sample for sample in result.samples if sample.ok]
    failed = [sample for sample in result.samples if not sample.ok]
    refused = Counter(str(status) for sample in result.samples for status in sample.refusals)
    refused.update(str(sample.status) for sample in failed if sample.status in (429, 503))
    prompts, outputs = sum(s.prompt_tokens for s in done), sum(s.output_tokens for s in done)
    chunks = sum(len(sample.times) for sample in done)
    seconds = result.duration or float("inf")
    return Summary(
        duration=result.duration,
        completed=len(done),
        failed=len(failed),
        refused=dict(refused),
        errors=dict(Counter(sample.error or "" for sample in failed)),
        short_answers=sum(sample.output_tokens < sample.wanted_tokens for sample in done),
        prompt_tokens=prompts,
        output_tokens=outputs,
        request_rate=len(done) / seconds,
        output_rate=outputs / seconds,
        total_rate=(prompts + outputs) / seconds,
        tokens_per_chunk=outputs / chunks if chunks else 0.0,
        ttft=Spread.of([s.ttft for s in done if s.ttft is not None]),
        itl=Spread.of([gap for s in done for gap in s.gaps]),
        tpot=Spread.of([s.tpot for s in done if s.tpot is not None]),
        e2e=Spread.of([s.e2e for s in done if s.e2e is not None]),
        goodput=sum(map(slo.met_by, done)) / seconds if slo and slo != Slo() else None,
        client_busy=result.cpu_seconds / seconds,
        sent_late=max((s.sent - s.scheduled for s in result.samples), default=0.0) if result.open_loop else 0.0,
        interrupted=result.interrupted,
    )
