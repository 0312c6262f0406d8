"""One request at a time, to its end. The weights are read once for every token of every request."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from phase0_prototype.request import Request
from phase0_prototype.step import ScheduledRequest, Step

if TYPE_CHECKING:
    from .kv_cache import KVCache


class Scheduler:
    """Decides which tokens the next forward pass works on.

    Args:
        kv: the cache whose rows limit how many sequences run together.
        max_num_batched_tokens: most prompt tokens in one step; a longer prompt runs in a step of its own.
    """

    def __init__(self, kv: KVCache, max_num_batched_tokens: int) -> None:
        self.kv = kv
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def has_unfinished(self) -> bool:
        """Whether there is anything left to run."""
        return bool(self.waiting or self.running)

    def next_step(self) -> Step:
        """The tokens of the one running request that have not been computed."""
        # TASK 0.2: a decode step reads every weight, whether for one sequence or for thirty. Run as many requests
        # together as the cache has rows; prompts first, at most `max_num_batched_tokens` of their tokens in a step.
        if not self.running:
            self.running.append(self.waiting.popleft())
            self.kv.acquire(self.running[0])
        request = self.running[0]
        return Step((ScheduledRequest(request, request.num_computed_tokens, request.num_new_tokens),))

    def finish(self, step: Step, tokens: list[list[int]]) -> list[Request]:
        """Record what a step computed and sampled; returns the requests that ended.

        Args:
            step: the step that ran.
            tokens: new tokens of each scheduled request, in the step's order.
        """
        for scheduled, new in zip(step.scheduled, tokens, strict=True):
            scheduled.request.num_computed_tokens = self.kv.computed(scheduled.request, scheduled.end)
            for token in new:
                if scheduled.request.finish_reason is None:
                    scheduled.request.append(token)
        ended = [s.request for s in step.scheduled if s.request.finish_reason is not None]
        for request in ended:
            self._remove(request)
        return ended

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now, wherever it is, and free what it holds."""
        request.finish_reason = request.finish_reason or reason
        if request in self.running:
            self._remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _remove(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.release(request)
