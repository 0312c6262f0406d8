"""What a prompt's sequences have produced so far: text, log-probabilities and times, until it is a `RequestOutput`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from phase0_prototype.detokenizer import Detokenizer, OutputText
from phase0_prototype.logprobs import TokenLogprobs
from phase0_prototype.outputs import (
    CompletionOutput,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    position_logprobs,
)
from phase0_prototype.request import Request
from phase0_prototype.tokenizer import Tokenizer


@dataclass
class _Sequence:
    """One of the n continuations."""

    text: OutputText | None
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative: float = 0.0


class Answer:
    """One prompt with its n sequences.

    Args:
        request_id: of the prompt.
        prompt: its text, if it was given as text.
        requests: its sequences.
        tokenizer: None leaves the text empty.
    """

    def __init__(self, request_id: str, prompt: str | None, requests: list[Request], tokenizer: Tokenizer | None):
        self.request_id, self.prompt, self.requests, self._tokenizer = request_id, prompt, requests, tokenizer
        params = requests[0].params
        self._sequences = {
            r.request_id: _Sequence(
                OutputText(
                    Detokenizer(tokenizer, params.skip_special_tokens, r.prompt_token_ids),
                    params.stop,
                    params.include_stop_str_in_output,
                    params.min_tokens,
                )
                if tokenizer
                else None
            )
            for r in requests
        }
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._arrival = time.perf_counter()
        self._first_token: float | None = None
        self._finished: float | None = None

    def take_token(self, request: Request, logprobs: TokenLogprobs | None, row: int, now: float) -> None:
        """Record the token that was just appended to the request.

        Args:
            request: one of this prompt's.
            logprobs: of the step, or None.
            row: the request's row in them.
            now: time of the step's end.
        """
        self._first_token = self._first_token or now
        sequence, token = self._sequences[request.request_id], request.output_token_ids[-1]
        hidden = request.finish_reason == "stop" and not request.params.include_stop_str_in_output
        if sequence.text is not None and not hidden:
            sequence.text.append([token])
        if request.params.logprobs is not None and logprobs is not None:
            (candidates,) = self._named(logprobs, [row], request.params.logprobs)
            sequence.logprobs.append(candidates)
            sequence.cumulative += candidates[token].logprob

    def take_prompt(self, request: Request, start: int, logprobs: TokenLogprobs) -> None:
        """Record log-probabilities of the prompt's tokens from `start` on (of the first sequence; they are equal)."""
        if request.index == 0:
            wanted = request.params.prompt_logprobs or 0
            known = (self._prompt_logprobs or [None])[:start]
            self._prompt_logprobs = known + self._named(logprobs, list(range(len(logprobs.token_ids))), wanted)

    def stopped_by(self, request: Request) -> str | None:
        """The stop string that the request's text has reached."""
        text = self._sequences[request.request_id].text
        return None if text is None else text.stopped_by

    def finish(self, request: Request, now: float) -> None:
        """No more tokens come for this request. Its last characters may still complete a stop string."""
        text = self._sequences[request.request_id].text
        if text is not None:
            text.finish()
            if text.stopped_by is not None:
                request.finish_reason, request.stop_reason = "stop", text.stopped_by
        if all(r.finish_reason is not None for r in self.requests):
            self._finished = now

    def output(self) -> RequestOutput:
        """Everything so far."""
        return RequestOutput(
            self.request_id,
            self.prompt,
            list(self.requests[0].prompt_token_ids),
            self._prompt_logprobs,
            [self._completion(r) for r in self.requests],
            all(r.finish_reason is not None for r in self.requests),
            RequestMetrics(self._arrival, self._first_token, self._finished),
        )

    def _completion(self, request: Request) -> CompletionOutput:
        sequence = self._sequences[request.request_id]
        wants = request.params.logprobs is not None
        return CompletionOutput(
            request.index,
            sequence.text.text if sequence.text else "",
            list(request.output_token_ids),
            sequence.cumulative if wants else None,
            list(sequence.logprobs) if wants else None,
            request.finish_reason,
            request.stop_reason,
        )

    def _named(self, logprobs: TokenLogprobs, rows: list[int], k: int) -> list[PositionLogprobs]:
        top = logprobs.top_ids.shape[1] if k < 0 else k
        chosen, values, ranks = (t[rows].tolist() for t in (logprobs.token_ids, logprobs.logprobs, logprobs.ranks))
        top_ids, top_values = logprobs.top_ids[rows, :top].tolist(), logprobs.top_logprobs[rows, :top].tolist()
        return [
            position_logprobs(*row, self._decode)
            for row in zip(chosen, values, ranks, top_ids, top_values, strict=True)
        ]

    def _decode(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False) if self._tokenizer else ""
