"""What `LLM.generate` returns, in vLLM's shape and names: `result[i].outputs[j].text`.

Plain data on the host: no tensors, so an answer can be kept, pickled or sent to another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """One candidate for one position.

    Attributes:
        logprob: natural logarithm of its probability under the model's own logits.
        rank: 1 for the most likely token.
        decoded_token: its text on its own.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # by token id: the token that stands there first, then the most likely ones


@dataclass(frozen=True)
class CompletionOutput:
    """One of the `n` continuations of a prompt.

    Attributes:
        index: 0 .. n-1.
        text: the generated text, cut at a stop string.
        token_ids: all generated tokens, those of the stop string or the end token too.
        cumulative_logprob: sum of the tokens' log-probabilities; None unless `logprobs` was asked for.
        logprobs: for each token; None unless asked for.
        finish_reason: "stop" (end token, stop token, stop string), "length", "abort", or None while it runs.
        stop_reason: the stop string or stop token id; None if the model's own end token or the length ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether no more tokens follow."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request: seconds of one monotonic clock, None when not yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and all its continuations.

    Attributes:
        request_id: unique in the engine.
        prompt: its text; None if token ids were given.
        prompt_token_ids: its tokens.
        prompt_logprobs: for each token of the prompt (None for the first: nothing predicts it); None unless asked for.
        outputs: the `n` continuations.
        finished: whether all of them are.
        metrics: when it arrived, began and ended.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None


def position_logprobs(
    token_id: int,
    logprob: float,
    rank: int,
    top_ids: Sequence[int],
    top_logprobs: Sequence[float],
    decode: Callable[[int], str],
) -> PositionLogprobs:
    """Name one row of `logprobs.TokenLogprobs`: the token itself, then the most likely ones in order.

    Args:
        token_id, logprob, rank: the token that was chosen, or that the prompt holds.
        top_ids, top_logprobs: the most likely tokens, best first.
        decode: the text of one token.
    """
    candidates = {token_id: Logprob(logprob, rank, decode(token_id))}
    for place, (candidate, value) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
        if candidate != token_id:
            candidates[candidate] = Logprob(value, place, decode(candidate))
    return candidates
