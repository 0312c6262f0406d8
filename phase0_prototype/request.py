"""A request: one sequence of tokens that grows until it ends. The only mutable object that crosses the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from phase0_prototype.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """One sequence. A prompt with `n > 1` becomes n requests that share `group`.

    Attributes:
        request_id: unique in the engine.
        prompt_token_ids: the prompt, never changed.
        params: how to choose tokens and when to stop.
        seed: resolved seed of this sequence's random choices (64 bits).
        eos_token_ids: ids that end the sequence unless `params.ignore_eos`.
        max_tokens: resolved limit of generated tokens (`params.max_tokens` cut to the context).
        index: 0 .. n-1 among the sequences of one prompt.
        group: request id of the prompt; sequences of one group have the same prompt. "": a group of its own.
        priority: smaller is more urgent, for a scheduler that looks at it.
        arrival: when it came, seconds of the scheduler's clock.
        deadline: when it is of no use any more, on the same clock; None: never.
        output_token_ids: generated so far.
        num_computed_tokens: how many leading tokens have their keys and values in the cache, or will have when the
            steps that run now are over.
        num_pending: tokens that such a step is choosing: they are in no list yet.
        preemptions: how often it lost its memory.
        finish_reason: None while running, then "stop", "length" or "abort".
        stop_reason: the stop token id or stop string that ended it, if one did.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    max_tokens: int
    index: int = 0
    group: str = ""
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending: int = 0
    preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the sequence so far, prompt included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that the next forward pass must process before it can predict another."""
        return self.num_tokens - self.num_computed_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions start..end-1 of prompt and output together."""
        prompt = len(self.prompt_token_ids)
        if start >= prompt:
            return self.output_token_ids[start - prompt : end - prompt]
        return self.prompt_token_ids[start:end] + self.output_token_ids[: max(0, end - prompt)]

    def append(self, token_id: int) -> None:
        """Add a generated token and decide whether it ends the sequence."""
        self.output_token_ids.append(token_id)
        params = self.params
        if len(self.output_token_ids) >= params.min_tokens:
            if token_id in params.stop_token_ids:
                self.finish_reason, self.stop_reason = "stop", token_id
            elif token_id in self.eos_token_ids and not params.ignore_eos:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.output_token_ids) >= self.max_tokens:
            self.finish_reason = "length"
