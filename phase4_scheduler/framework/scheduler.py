"""Static batches: a batch is taken, computed to its last token, and only then comes the next.

A request enters when all tokens that it could ever have fit into free blocks, and keeps them. Prompts run whole, then
everybody generates. Nothing can go wrong afterwards: nobody runs out of memory, nobody is ever interrupted. Meanwhile
places stand empty, and whoever came a moment too late waits for the longest answer of the batch.

The scheduler never waits for a step. It notes what a step will have computed when it decides on it, and that a token is
coming (`Request.num_pending`), so that a loop may ask for the next one while this one runs (loop.py). It knows no
model, no device and no clock but the one that it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from phase0_prototype.request import Request
from phase0_prototype.step import NO_TOKEN, ScheduledRequest, Step
from phase1_memory.runs import Write
from phase4_scheduler.memory import Memory, Swap
from phase4_scheduler.scheduler_config import SchedulerConfig

from .policies import make_policy

LATE = "deadline"  # stop_reason of a sequence whose time was over


class Scheduler:
    """Decides which tokens the next forward pass works on, and who holds memory.

    Args:
        memory: the KV cache; one sequence of the longest length must fit in it.
        config: budget, policy, what to do when blocks run out.
        swap: for preemption="swap".
        clock: seconds, for deadlines and dynamic batching.

    Attributes:
        running: in the order in which they came in.
        preemptions: sequences that lost their blocks before they ended (`Request.preemptions` has its own).
        recomputed_tokens: tokens that were computed again for it.
    """

    def __init__(
        self,
        memory: Memory,
        config: SchedulerConfig,
        swap: Swap | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv, self.config, self.swap, self.clock = memory, config, swap, clock
        self.policy = make_policy(config)
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = self.recomputed_tokens = 0
        self._rejected: list[Request] = []  # ended without a token: the next step names them

    # --- requests come and go ---

    def add(self, request: Request) -> None:
        """Queue a request. Those of one group that come one after the other share their prompt."""
        # TASK 4.1: sequences of one group have the same prompt: compute it once (`ScheduledRequest.forks`). Here each
        # computes it for itself.
        request.arrival = request.arrival or self.clock()
        self._enqueue(request)

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now, wherever it is, and free what it holds. One that has ended already is left alone."""
        if request in self.running or request in self.queue:
            request.finish_reason = request.finish_reason or reason
            self._leave(request)

    def has_unfinished(self) -> bool:
        """Whether there is anything left to run or to tell."""
        return bool(self.queue or self.running or self._rejected)

    @property
    def waiting(self) -> list[Request]:
        """In the order of the queue, sequences that wait for their prompt's blocks or for their own to come back."""
        return list(self.queue)

    @property
    def num_swapped(self) -> int:
        """Sequences whose blocks are elsewhere."""
        return 0

    def backlog_tokens(self) -> int:
        """Tokens of prompts that are not computed yet."""
        return sum(max(0, len(r.prompt_token_ids) - r.num_computed_tokens) for r in (*self.queue, *self.running))

    def idle_for(self) -> float | None:
        """Seconds in which a step would find nothing to do; 0: it would; None: not before another request comes."""
        # TASK 4.1: dynamic batching: an idle engine waits for company, `batch_size` requests or `batch_wait` seconds.
        return 0.0 if self.has_unfinished() else None

    def may_run_ahead(self) -> bool:
        """Whether the next step can be launched before the tokens of this one are known."""
        penalties = (r.params for r in self.running)
        return not any(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1 for p in penalties)

    # --- steps ---

    def next_step(self) -> Step:
        """What to compute now. Its requests count as computed from here on: call `finish`, or `failed`."""
        self._expire()
        # TASK 4.1: make every step anew, under one budget of `max_num_batched_tokens`: a token of each sequence that
        # generates, and of prompts as much as there is room for, in pieces. Who ends leaves its place to the next at
        # once. Reserve what a step needs, not what an answer might need one day; then blocks can run out between two
        # tokens: take those of the last in the order away (`preemption`), and compute them again or bring them back.
        if not self.running:
            self._next_batch()
        prompts = [r for r in self.running if r.num_computed_tokens == 0]
        chosen = self._whole_prompts(prompts) if prompts else [r for r in self.running if self._uncomputed(r)]
        rejected, self._rejected = self._rejected, []
        return Step(tuple([self._commit(request) for request in chosen]), tuple(rejected))

    def finish(self, step: Step, tokens: list[list[int]]) -> list[Request]:
        """Record what a step chose; returns the requests that ended.

        Args:
            step: the oldest that has not been finished.
            tokens: new tokens of each of `step.requests`; `NO_TOKEN` ends a request with "error".
        """
        ended = []
        for request, new in zip(step.requests, tokens, strict=True):
            if request.finish_reason is not None:  # by abort, while the step ran
                continue
            request.num_pending = max(0, request.num_pending - len(new))
            for token in new:
                if token == NO_TOKEN:
                    request.finish_reason = "error"
                elif request.finish_reason is None:
                    request.append(token)
            if request.finish_reason is not None:
                self._leave(request)
                ended.append(request)
        return ended

    def failed(self, steps: Iterable[Step]) -> None:
        """These steps, all that were not finished, have not computed what they should: begin their requests anew."""
        for step in steps:
            self._rejected += step.rejected
            for request in step.requests:
                if request in self.running:
                    self.recomputed_tokens += request.num_computed_tokens
                    request.num_computed_tokens = request.num_pending = 0
                    self._leave(request)
                    self._enqueue(request)

    # --- what a step is made of ---

    def _next_batch(self) -> None:
        """As many as there are places, and blocks for their longest answers."""
        while self.queue and len(self.running) < self.config.max_num_seqs:
            request = self.queue[0]
            longest = len(request.prompt_token_ids) + request.max_tokens
            if not self.kv.reserve([Write(request.request_id, 0, longest)]):
                return
            self.running.append(self.queue.pop(0))

    def _whole_prompts(self, prompts: list[Request]) -> list[Request]:
        """Prompts are not cut: one that is longer than the budget runs alone."""
        chosen: list[Request] = []
        budget = self.config.max_num_batched_tokens
        for request in prompts:
            if chosen and request.num_new_tokens > budget:
                break
            chosen.append(request)
            budget -= request.num_new_tokens
        return chosen

    def _uncomputed(self, request: Request) -> int:
        """Tokens that a running request can have computed now."""
        if len(request.output_token_ids) + request.num_pending >= request.max_tokens:
            return 0  # its last token is on the way
        return request.num_tokens + request.num_pending - request.num_computed_tokens

    def _commit(self, request: Request) -> ScheduledRequest:
        """What the step will have done is noted now."""
        start, count = request.num_computed_tokens, self._uncomputed(request)
        scheduled = ScheduledRequest(request, start, count, pending=max(0, start + count - request.num_tokens))
        request.num_computed_tokens = start + count
        request.num_pending += 1
        return scheduled

    # --- in and out ---

    def _enqueue(self, request: Request) -> None:
        self.queue.append(request)
        self.queue.sort(key=self.policy.key)  # equal keys stay in the order in which they came

    def _leave(self, request: Request) -> None:
        """Out of the queue, or out of the batch with its blocks."""
        if request in self.running:
            self.running.remove(request)
            self.kv.release(request)
        else:
            self.queue.remove(request)

    def _expire(self) -> None:
        now = self.clock()
        for request in [*self.queue, *self.running]:
            if request.deadline is not None and request.deadline <= now:
                request.finish_reason, request.stop_reason = "abort", LATE
                self._leave(request)
                self._rejected.append(request)
