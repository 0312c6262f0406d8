"""Whether one more request may join the queue, and when a refused one should come back. Pure logic.

Everybody is let in, so everybody waits: for as long as it takes, whether or not they are still there to see the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST, LONGEST = 1.0, 120.0  # seconds of Retry-After
GUESS = 5.0  # seconds: nobody has counted


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
        # TASK 4.4: refuse what would make the queue longer than its bounds, in sequences or in tokens of prompts, and
        # say when to come back. Mind `max_num_queued_reqs=0`, and a request that brings more than the queue may hold.
        return None


def retry_after(load: Load) -> float:
    """Seconds until what was let in has been computed at the measured speed."""
    # TASK 4.4: what is ahead, over how fast it goes; between SHORTEST and LONGEST. What if nothing was measured yet?
    return GUESS
