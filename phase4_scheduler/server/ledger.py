"""Every request that was let in, until it ends: exactly once, with one of four reasons. All counting is here."""

from __future__ import annotations

from time import perf_counter

from phase4_scheduler.server.meter import Meter
from phase4_scheduler.server.metrics import REASONS, Metrics

_MEMORY = 0.05  # how much one answer changes what is expected of the next
_GUESS = 128.0  # tokens of an answer before there was one


class Ledger:
    """What is open, and what has ended.

    Args:
        meter, metrics: are told.

    Attributes:
        open_prompts, open_seqs: let in and not ended.
        prompt_tokens: of open prompts without a first token.
        generated: tokens of open prompts so far.
        accepted: prompts.
        ends: prompts that have ended, by reason.
    """

    def __init__(self, meter: Meter, metrics: Metrics) -> None:
        self.meter, self.metrics = meter, metrics
        self.open_prompts = self.open_seqs = self.prompt_tokens = self.generated = self.accepted = 0
        self.ends = dict.fromkeys(REASONS, 0)
        self._answer = _GUESS

    @property
    def ended(self) -> int:
        """Prompts that have ended."""
        return sum(self.ends.values())

    @property
    def backlog_tokens(self) -> float:
        """Tokens to compute until all has ended, if answers are as long as they have been."""
        return self.prompt_tokens + max(0.0, self.open_seqs * self._answer - self.generated)

    def open(self, prompt_tokens: int, n: int) -> Ticket:
        """A prompt is let in."""
        self.accepted += 1
        self.open_prompts += 1
        self.open_seqs += n
        self.prompt_tokens += prompt_tokens
        self.metrics.accepted.inc()
        self.metrics.n.observe(n)
        self.metrics.prompt_length.observe(prompt_tokens)
        return Ticket(self, prompt_tokens, n)

    def close(self, ticket: Ticket, reason: str) -> None:
        """A prompt has ended; called by its ticket, once."""
        self.open_prompts -= 1
        self.open_seqs -= ticket.n
        self.generated -= ticket.generated
        self.ends[reason] += 1
        if not ticket.has_begun:
            self.prompt_tokens -= ticket.prompt_tokens
        if reason in ("stop", "length"):
            self._answer += _MEMORY * (ticket.generated / ticket.n - self._answer)
            self.metrics.e2e.observe(perf_counter() - ticket.arrival)
        self.metrics.answer_length.observe(ticket.generated)
        self.metrics.ended[reason].inc()


class Ticket:
    """One prompt in the ledger.

    Attributes:
        prompt_tokens, n: of the prompt.
        arrival: when it was let in.
        generated: tokens so far.
        has_begun: whether there was a first token.
    """

    __slots__ = ("_ledger", "_newest", "arrival", "generated", "has_begun", "is_open", "n", "prompt_tokens")

    def __init__(self, ledger: Ledger, prompt_tokens: int, n: int) -> None:
        self._ledger, self.prompt_tokens, self.n = ledger, prompt_tokens, n
        self.arrival = self._newest = perf_counter()
        self.generated, self.has_begun, self.is_open = 0, False, True

    def took(self, tokens: int, queued: float | None) -> None:
        """New tokens came; `queued` is how long the prompt waited in the engine, as far as known."""
        now = perf_counter()
        gap, self._newest = now - self._newest, now
        ledger = self._ledger
        if self.has_begun:
            ledger.metrics.itl.observe(gap)
            ledger.meter.itl.append(gap)
        else:
            self.has_begun = True
            ledger.prompt_tokens -= self.prompt_tokens
            ledger.metrics.prompt_tokens.inc(self.prompt_tokens)
            ledger.metrics.ttft.observe(gap)
            ledger.meter.ttft.append(gap)
            if queued is not None:
                ledger.metrics.queue.observe(queued)
        self.generated += tokens
        ledger.generated += tokens
        ledger.metrics.generation_tokens.inc(tokens)

    def end(self, reason: str) -> None:
        """The prompt has ended: "stop", "length", "abort" or "error". Only the first call counts."""
        if self.is_open:
            self.is_open = False
            self._ledger.close(self, reason)
