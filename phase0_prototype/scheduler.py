"""Static batching: take as many requests as fit, run them together until all are finished, then take the next ones.

The tokens of a step are flat, so prompts of different lengths share a forward pass without padding, and a sequence that
ends early simply stops contributing. Its place is not given to a waiting request before the batch is over: that is
continuous batching, phase 4.
"""

from __future__ import annotations

from collections import deque

from phase0_prototype.kv_cache import KVCache
from phase0_prototype.request import Request
from phase0_prototype.step import ScheduledRequest, Step


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
        """Prompts first, as many as the budget allows; when every prompt of the batch is in, one token of each."""
        if not self.running:
            while self.waiting and self.kv.num_free:
                request = self.waiting.popleft()
                self.kv.acquire(request)
                self.running.append(request)
        prompts = [r for r in self.running if not r.output_token_ids]
        chosen: list[Request] = []
        budget = self.max_num_batched_tokens
        for request in prompts:
            if chosen and request.num_new_tokens > budget:
                break
            chosen.append(request)
            budget -= request.num_new_tokens
        if not chosen:  # in the order of their rows: attention reads neighbouring rows as one slice
            chosen = sorted(self.running, key=self.kv.blocks)
        return Step(tuple(ScheduledRequest(r, r.num_computed_tokens, r.num_new_tokens) for r in chosen))

    def finish(self, step: Step, tokens: list[list[int]]) -> list[Request]:
        """Record what a step computed and sampled; returns the requests that ended.

        Args:
            step: the step that ran.
            tokens: new tokens of each of `step.requests`.
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
