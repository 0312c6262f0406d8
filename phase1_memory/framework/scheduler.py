"""Admission by the worst case: a sequence starts when all tokens that it could ever have fit, and keeps them.

Nothing can go wrong afterwards, and most of the memory holds nothing.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from phase0_prototype.request import Request
from phase0_prototype.step import ScheduledRequest, Step
from phase1_memory.runs import Write

if TYPE_CHECKING:
    from phase1_memory.kv_cache import PagedKVCache

REJECTED = "out of KV blocks"  # stop_reason of a sequence that was ended because there was no memory


class Store(Protocol):
    """Where the blocks of swapped sequences wait (offload.py)."""

    def save(self, key: str, blocks: Tensor) -> bool:
        """Keep [n, block_bytes] uint8; False where there is no room."""
        ...

    def prefetch(self, key: str) -> None:
        """Begin to bring them near."""
        ...

    def ready(self, key: str) -> bool:
        """Whether `load` would not wait."""
        ...

    def load(self, key: str) -> Tensor | None:
        """Give them back and forget them; None: they were lost."""
        ...

    def drop(self, key: str) -> None:
        """Forget them."""
        ...


class Scheduler:
    """Decides which tokens the next forward pass works on, and who holds memory.

    Args:
        kv: the cache.
        max_num_batched_tokens: most prompt tokens in one step; a longer prompt runs in a step of its own.
        max_num_seqs: sequences that run together.
        watermark: share of the blocks that admission leaves free, so that what runs can grow for a while.
        pressure: when blocks run out: "recompute", "swap" (recompute where the store is full) or "reject".
        store: for "swap".

    Attributes:
        preemptions: sequences that lost their blocks before they ended.
        recomputed_tokens: tokens that will be computed again for it.
    """

    def __init__(
        self,
        kv: PagedKVCache,
        max_num_batched_tokens: int,
        max_num_seqs: int = 256,
        *,
        watermark: float = 0.01,
        pressure: str = "recompute",
        store: Store | None = None,
    ) -> None:
        self.kv, self.store, self.pressure = kv, store, pressure
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = self.recomputed_tokens = 0

    def add(self, request: Request) -> None:
        """Queue a request. Those of one group that come one after the other share their prompt."""
        # TASK 1.3: sequences of one group have the same prompt: compute it once (`ScheduledRequest.forks`).
        self.waiting.append(request)

    def has_unfinished(self) -> bool:
        """Whether there is anything left to run."""
        return bool(self.waiting or self.running)

    def next_step(self) -> Step:
        """Prompts that fit, else one token of every running sequence."""
        prompts: list[ScheduledRequest] = []
        budget = self.max_num_batched_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            # TASK 1.3: reserve what the prompt needs, not what the answer might need one day. Leave the watermark. Then
            # blocks can run out between two tokens: take the youngest sequence's away, and compute or fetch them again.
            longest = len(request.prompt_token_ids) + request.max_tokens
            if (prompts and request.num_new_tokens > budget) or not self.kv.reserve(
                [Write(request.request_id, 0, longest)]
            ):  # fmt: skip
                break
            prompts.append(ScheduledRequest(self.waiting.popleft(), 0, request.num_new_tokens))
            self.running.append(request)
            budget -= request.num_new_tokens
        if prompts:
            return Step(tuple(prompts))
        return Step(tuple(ScheduledRequest(r, r.num_computed_tokens, r.num_new_tokens) for r in self.running))

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
