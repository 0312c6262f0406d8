"""The scheduler's decision for one forward pass, and what came of it. No torch: a scheduler can run without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phase0_prototype.errors import SamplingError
from phase0_prototype.request import Request

if TYPE_CHECKING:
    from phase0_prototype.logprobs import TokenLogprobs

NO_TOKEN = -1  # in the place of a token that could not be chosen


@dataclass(frozen=True)
class ScheduledRequest:
    """`num_tokens` of the request's uncomputed tokens go into this step, starting at `start`.

    `forks` are sequences with the same tokens that begin here: they are computed once, and each samples from the logits
    of the last. (Phase 0 computes every sequence on its own and has none.) `pending` counts the tokens at the end whose
    ids a step that still runs is choosing (phase 4: 0 or 1).

    Attributes:
        samples: whether the step reaches the sequence's last token, whose logits choose the next one.
    """

    request: Request
    start: int
    num_tokens: int
    forks: tuple[Request, ...] = ()
    pending: int = 0
    samples: bool = field(init=False)  # decided now: the request may have grown when the step ends

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.end == self.request.num_tokens + self.pending)

    @property
    def end(self) -> int:
        """Position after the last token of this step."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Step:
    """The scheduler's decision for one forward pass; `rejected` ended without one, for want of memory or of time."""

    scheduled: tuple[ScheduledRequest, ...]
    rejected: tuple[Request, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward pass processes."""
        return sum(s.num_tokens for s in self.scheduled)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every sequence that the step is for: each scheduled request, followed by its forks."""
        return tuple(request for s in self.scheduled for request in (s.request, *s.forks))

    @property
    def sampling(self) -> tuple[Request, ...]:
        """The sequences that get a token, in the order of the rows of logits."""
        return tuple(request for s in self.scheduled if s.samples for request in (s.request, *s.forks))


@dataclass(frozen=True)
class StepTokens:
    """What a step chose.

    Attributes:
        step: that ran.
        requests: sequences that take a token of it.
        rows: the place of each in the rows that were sampled.
        token_ids: the token of each row; `NO_TOKEN` where none could be chosen.
        logprobs: of every row with the largest k that a row asked for; None when no row asked.
        prompt_logprobs: (request, place of the first token in the prompt, values) of prompts that asked, as far as this
            step has computed them.
    """

    step: Step
    requests: Sequence[Request] = ()
    rows: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[tuple[Request, int, TokenLogprobs]] = ()

    def by_request(self) -> list[list[int]]:
        """New tokens of each of `step.requests`, as `Scheduler.finish` takes them."""
        chosen = {r.request_id: self.token_ids[row] for r, row in zip(self.requests, self.rows, strict=True)}
        return [[chosen[i]] if (i := r.request_id) in chosen else [] for r in self.step.requests]


def insist(token_ids: Sequence[int], request_ids: Sequence[str]) -> None:
    """Raise `SamplingError` that names the first row without a token."""
    if NO_TOKEN in token_ids:
        row = token_ids.index(NO_TOKEN)
        raise SamplingError(
            f"no token can be chosen for request {request_ids[row]} (row {row}): its logits hold NaN or +inf, "
            "or all tokens are banned: check the weights, dtype and stop_token_ids"
        )
