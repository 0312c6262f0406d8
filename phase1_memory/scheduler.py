"""Admission by blocks, and what happens when they run out.

A sequence joins as soon as its tokens fit and leaves the memory when it ends; nobody waits for a batch to be over.
Prompts run before decodes, in steps of their own (mixing them under one budget is phase 4). When the next token of all
running sequences does not fit, the youngest goes: its blocks are dropped and computed again later, or are moved to an
offload store and brought back, or it is ended. The oldest never goes, so there is always progress.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import Protocol

from torch import Tensor

from phase0_prototype.request import Request
from phase0_prototype.step import ScheduledRequest, Step
from phase1_memory.kv_cache import PagedKVCache
from phase1_memory.runs import Write

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
        self.spare = math.ceil(watermark * kv.tables.num_blocks)
        self.waiting: deque[list[Request]] = deque()  # groups whose prompt is computed once
        self.running: list[Request] = []  # oldest first
        self.swapped: list[Request] = []  # oldest first
        self._rejected: list[Request] = []  # named in every step until one of them has been finished
        self._arrival: dict[str, int] = {}
        self._arrived = 0
        self.preemptions = self.recomputed_tokens = 0

    def add(self, request: Request) -> None:
        """Queue a request. Those of one group that come one after the other share their prompt."""
        self._arrival[request.request_id] = self._arrived
        self._arrived += 1
        last = self.waiting[-1][-1] if self.waiting else None
        if last is not None and _same_prompt(last, request):
            self.waiting[-1].append(request)
        else:
            self.waiting.append([request])

    def has_unfinished(self) -> bool:
        """Whether there is anything left to run."""
        return bool(self.waiting or self.running or self.swapped or self._rejected)

    def next_step(self) -> Step:
        """Prompts that fit, else one token of every running sequence, after making room for it."""
        self._plan_again()
        self._resume()
        prompts = () if self.swapped else self._admit()
        if prompts:
            return Step(prompts, tuple(self._rejected))
        while not self.kv.reserve([_next_write(r) for r in self.running]):
            self._preempt(self.running[-1])
        scheduled = tuple(ScheduledRequest(r, r.num_computed_tokens, r.num_new_tokens) for r in self.running)
        return Step(scheduled, tuple(self._rejected))

    def finish(self, step: Step, tokens: list[list[int]]) -> list[Request]:
        """Record what a step computed and sampled; returns the requests that ended.

        Args:
            step: the step that ran.
            tokens: new tokens of each of `step.requests`.
        """
        for scheduled in step.scheduled:
            scheduled.request.num_computed_tokens = self.kv.computed(scheduled.request, scheduled.end)
            for fork in scheduled.forks:
                self.kv.fork(scheduled.request, fork)
        for request, new in zip(step.requests, tokens, strict=True):
            for token in new:
                if request.finish_reason is None:
                    request.append(token)
        self._rejected = [request for request in self._rejected if request not in step.rejected]
        ended = [request for request in step.requests if request.finish_reason is not None]
        for request in ended:
            self._remove(request)
        return ended

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now, wherever it is, and free what it holds."""
        request.finish_reason = request.finish_reason or reason
        if request in self._rejected:
            self._rejected.remove(request)
        elif request in self.running:
            self._remove(request)
        elif request in self.swapped:
            self.swapped.remove(request)
            assert self.store is not None
            self.store.drop(request.request_id)
            del self._arrival[request.request_id]
        else:
            for group in self.waiting:
                if request in group:
                    group.remove(request)
                    del self._arrival[request.request_id]
            self.waiting = deque(group for group in self.waiting if group)

    def _admit(self) -> tuple[ScheduledRequest, ...]:
        """Waiting prompts, first come first served, as far as blocks, budget and places allow."""
        chosen: list[ScheduledRequest] = []
        budget, free = self.max_num_batched_tokens, self.kv.num_free
        while self.waiting and (places := self.max_num_seqs - len(self.running)) > 0:
            group = self.waiting[0]
            tokens = group[0].num_tokens
            need = self.kv.tables.pages(tokens)
            if (chosen and tokens > budget) or need + (self.spare if self.running else 0) > free:
                break
            leader, *forks = group[:places]
            del group[:places]
            if not group:
                self.waiting.popleft()
            chosen.append(ScheduledRequest(leader, 0, tokens, tuple(forks)))
            budget, free = budget - tokens, free - need
            for request in (leader, *forks):
                self._run(request)
        made = self.kv.reserve([Write(s.request.request_id, 0, s.end) for s in chosen])
        assert made, "admitted more than is free"
        return tuple(chosen)

    def _plan_again(self) -> None:
        """Put sequences without computed tokens back in the queue: their prompt's step failed, or they are forks that
        got nothing from their parent."""
        for request in reversed([r for r in self.running if not r.num_computed_tokens]):
            self.running.remove(request)
            self.kv.release(request)
            self._queue(request)

    def _queue(self, request: Request) -> None:
        """By age; what has no tokens of its own yet joins the rest of its group."""
        place = bisect.bisect([self._age(group[0]) for group in self.waiting], self._age(request))
        if place < len(self.waiting) and _same_prompt(request, self.waiting[place][0]):
            self.waiting[place].insert(0, request)
        else:
            self.waiting.insert(place, [request])

    def _resume(self) -> None:
        """Bring swapped sequences back, the oldest first, when they fit and their blocks have arrived."""
        while self.swapped and len(self.running) < self.max_num_seqs:
            request, store = self.swapped[0], self.store
            assert store is not None
            name, busy = request.request_id, bool(self.running)
            store.prefetch(name)
            write = Write(name, 0, request.num_tokens)
            if busy and (
                not store.ready(name) or self.kv.tables.pages(write.end) + self.spare > self.kv.num_free
            ):  # fmt: skip
                return
            self.swapped.pop(0)
            data = store.load(name)
            if data is None:  # lost: the store has said why
                self._recompute(request)
                continue
            made = self.kv.reserve([write])
            assert made, "a sequence is larger than the memory"
            self.kv.write(self.kv.blocks(request)[: len(data)], data)
            self._run(request)

    def _preempt(self, request: Request) -> None:
        """Take everything from a running sequence."""
        assert len(self.running) > 1, "a sequence is larger than the memory"
        if self.pressure == "reject":
            request.finish_reason, request.stop_reason = "abort", REJECTED
            self._rejected.append(request)
            self._remove(request)
            return
        self.preemptions += 1
        self.running.remove(request)
        if self.pressure == "swap" and self.store is not None:
            used = self.kv.blocks(request)[: self.kv.tables.pages(request.num_computed_tokens)]
            if self.store.save(request.request_id, self.kv.read(used)):
                self.kv.release(request)
                bisect.insort(self.swapped, request, key=self._age)
                return
        self.kv.release(request)
        self._recompute(request)

    def _recompute(self, request: Request) -> None:
        self.recomputed_tokens += request.num_computed_tokens
        request.num_computed_tokens = 0
        self._queue(request)

    def _run(self, request: Request) -> None:
        bisect.insort(self.running, request, key=self._age)

    def _remove(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.release(request)
        del self._arrival[request.request_id]

    def _age(self, request: Request) -> int:
        return self._arrival[request.request_id]


def _same_prompt(request: Request, other: Request) -> bool:
    """Whether the two are of one group and have nothing but their prompt."""
    return (
        bool(request.group)
        and request.group == other.group
        and not (request.output_token_ids or other.output_token_ids)
    )


def _next_write(request: Request) -> Write:
    return Write(request.request_id, request.num_computed_tokens, request.num_tokens)
