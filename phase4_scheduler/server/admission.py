"""Whether one more request may join the queue, and when a refused one should come back. Pure logic.

A queue without an end helps nobody: who waits longer than they are willing to has gone when their turn comes, and the
work is wasted. So the queue is bounded, in sequences and in tokens of prompts, and a refusal says when it is worth
trying again: the work that is ahead, divided by the speed that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST, LONGEST = 1.0, 120.0  # seconds of Retry-After


@dataclass(frozen=True)
class Load:
    """What is going on when a request asks to be let in.

    Attributes:
        open_seqs: sequences that were let in and have not ended.
        waiting_seqs: those of them that wait in the engine, as far as it has told.
        max_num_seqs: sequences that the engine runs together.
        prompt_tokens: of prompts that have no first token yet.
        backlog_tokens: tokens to compute until all that was let in has ended; answers as long as answers have been.
        tokens_per_second: prompts and answers together, over the last seconds; 0: nothing was measured.
    """

    open_seqs: int
    waiting_seqs: int
    max_num_seqs: int
    prompt_tokens: int
    backlog_tokens: float
    tokens_per_second: float

    @property
    def queued_seqs(self) -> int:
        """Sequences that wait. What the engine last told is a step old, so what doesn't fit in its batch counts too."""
        return max(self.waiting_seqs, self.open_seqs - self.max_num_seqs)


@dataclass(frozen=True)
class Refusal:
    """Why a request is not let in.

    Attributes:
        reason: "queued_reqs" or "queued_tokens".
        message: one line for the client.
        retry_after: seconds.
    """

    reason: str
    message: str
    retry_after: float


@dataclass(frozen=True)
class Admission:
    """The bounds of the queue; None: there is none.

    Attributes:
        max_num_queued_reqs: sequences that may wait.
        max_num_queued_tokens: prompt tokens that may wait.
    """

    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None

    def refusal(self, load: Load, seqs: int, tokens: int) -> Refusal | None:
        """None lets a request in that brings so many sequences and prompt tokens.

        A request that alone is larger than the queue is let in when nothing waits: it could never be served otherwise.
        """
        most = self.max_num_queued_reqs
        after = max(load.queued_seqs, load.open_seqs + seqs - load.max_num_seqs)
        if most is not None and after > most and load.queued_seqs > 0:
            return self._refused("queued_reqs", f"{load.queued_seqs} sequences wait, {most} may", load)
        if most == 0 and after > 0 and load.open_seqs > 0:
            return self._refused("queued_reqs", "all places are taken and none may wait", load)
        most = self.max_num_queued_tokens
        if most is not None and load.prompt_tokens + tokens > most and load.prompt_tokens > 0:
            return self._refused("queued_tokens", f"{load.prompt_tokens} prompt tokens wait, {most} may", load)
        return None

    def _refused(self, reason: str, why: str, load: Load) -> Refusal:
        seconds = retry_after(load)
        return Refusal(reason, f"the server is busy ({why}): try again in {seconds:.0f} s", seconds)


def retry_after(load: Load) -> float:
    """Seconds until what was let in has been computed at the measured speed."""
    if load.tokens_per_second <= 0:
        return SHORTEST
    return min(LONGEST, max(SHORTEST, load.backlog_tokens / load.tokens_per_second))
