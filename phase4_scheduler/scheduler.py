"""Continuous batching: every step is made anew, of whatever can run, under one budget of tokens.

A step takes tokens until `max_num_batched_tokens` are together: one of each sequence that generates, and of prompts as
many as there is room for. A prompt that is longer goes in pieces, between the tokens of the others, which therefore
never wait for it (Sarathi-Serve, Agrawal et al., OSDI 2024); a sequence that ends gives its place to the next one at
once (Orca, Yu et al., OSDI 2022). There is no phase of prompts and none of decodes: a request has tokens that are not
computed yet, one or many.

Who goes first is for a policy to say (policies.py). Where blocks run out the last of its order gives its own up, to be
computed again or brought back; where the policy is preemptive, so does whoever runs behind somebody that waits.

The scheduler never waits for a step. It notes what a step will have computed when it decides on it, and that a token is
coming (`Request.num_pending`), so it can decide on the next one while this one runs (loop.py). It knows no model, no
device and no clock but the one that it is given.
"""

from __future__ import annotations

import bisect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from phase0_prototype.request import Request
from phase0_prototype.step import NO_TOKEN, ScheduledRequest, Step
from phase1_memory.runs import Write
from phase4_scheduler.memory import Memory, Swap
from phase4_scheduler.policies import make_policy
from phase4_scheduler.scheduler_config import SchedulerConfig

REJECTED = "out of KV blocks"  # stop_reason of a sequence that was ended because there was no memory
LATE = "deadline"  # and of one whose time was over

Key = tuple[float, int]


@dataclass(order=True)
class _Waiting:
    """Requests with one prompt, in the order of the queue; `swapped` ones are alone and have their tokens elsewhere."""

    key: Key
    requests: list[Request] = field(compare=False)
    swapped: bool = field(default=False, compare=False)


@dataclass
class _Plan:
    """A step that is being put together: nothing that a request says of itself has changed yet."""

    budget: int
    kept: int = 0  # blocks that are left to decodes, which come after prompts
    tokens: dict[str, int] = field(default_factory=dict)  # by request id
    requests: list[Request] = field(default_factory=list)
    pressed: bool = False  # somebody lost blocks: nobody new comes in

    def take(self, request: Request, count: int) -> None:
        self.tokens[request.request_id] = count
        self.requests.append(request)
        self.budget -= count

    def drop(self, request: Request) -> None:
        if request.request_id in self.tokens:
            self.budget += self.tokens.pop(request.request_id)
            self.requests.remove(request)


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
        self.spare = math.ceil(config.watermark * memory.tables.num_blocks)
        self.most = min(config.max_num_seqs, config.max_num_batched_tokens)  # of whom each can have a token every step
        self.queue: list[_Waiting] = []  # by key
        self.running: list[Request] = []
        self.preemptions = self.recomputed_tokens = 0
        self._forks: dict[str, list[Request]] = {}  # of a prompt that is being computed: who begins where it ends
        self._room: dict[str, int] = {}  # tokens that the blocks of a running request hold
        self._number: dict[str, int] = {}  # of arrival; everybody who has not ended is in it
        self._arrived = 0
        self._deadlines: list[tuple[float, int, Request]] = []  # the next first; of nobody who has ended
        self._rejected: list[Request] = []
        self._watchful = 0  # requests whose next token depends on which token came before, beside the model

    # --- requests come and go ---

    def add(self, request: Request) -> None:
        """Queue a request. Those of one group that come one after the other share their prompt."""
        self._arrived += 1
        self._number[request.request_id] = self._arrived
        request.arrival = request.arrival or self.clock()
        if request.deadline is not None:
            bisect.insort(self._deadlines, (request.deadline, self._arrived, request))
        self._watchful += _watches(request)
        self._enqueue(request)

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now, wherever it is, and free what it holds. One that has ended already is left alone."""
        if request.request_id in self._number:
            request.finish_reason = request.finish_reason or reason
            self._leave(request)

    def has_unfinished(self) -> bool:
        """Whether there is anything left to run or to tell."""
        return bool(self.queue or self.running or self._rejected)

    @property
    def waiting(self) -> list[Request]:
        """In the order of the queue, sequences that wait for their prompt's blocks or for their own to come back."""
        return [request for entry in self.queue for request in entry.requests]

    @property
    def num_swapped(self) -> int:
        """Sequences whose blocks are elsewhere."""
        return sum(entry.swapped for entry in self.queue)

    def backlog_tokens(self) -> int:
        """Tokens of prompts that are not computed yet."""
        queued = sum(entry.requests[0].num_new_tokens for entry in self.queue if not entry.swapped)
        return queued + sum(max(0, len(r.prompt_token_ids) - r.num_computed_tokens) for r in self.running)

    def idle_for(self) -> float | None:
        """Seconds in which a step would find nothing to do; 0: it would; None: not before another request comes."""
        if not self.has_unfinished():
            return None
        now = self.clock()
        wait = self._held_back(now)
        return max(0.0, min(wait, self._deadlines[0][0] - now)) if self._deadlines else wait

    def may_run_ahead(self) -> bool:
        """Whether the next step can be launched before the tokens of this one are known."""
        return not self._watchful

    # --- steps ---

    def next_step(self) -> Step:
        """What to compute now. Its requests count as computed from here on: call `finish`, or `failed`."""
        now = self.clock()
        self._expire(now)
        plan = _Plan(self.config.max_num_batched_tokens)
        self._make_way()
        if self.config.step_priority == "decode":
            self._decode(plan)
            self._prefill(plan, now)
        else:
            plan.kept = sum(self._may_need_block(r) for r in self.running if self._uncomputed(r) == 1)
            self._prefill(plan, now)
            self._decode(plan)
        rejected, self._rejected = self._rejected, []
        return Step(tuple([self._commit(request, plan) for request in plan.requests]), tuple(rejected))

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
                request.num_pending = 0
                if request.finish_reason is None:
                    self._begin_anew(request)

    # --- what a step is made of ---

    def _uncomputed(self, request: Request) -> int:
        """Tokens that a running request can have computed now."""
        if len(request.output_token_ids) + request.num_pending >= request.max_tokens:
            return 0  # its last token is on the way
        return request.num_tokens + request.num_pending - request.num_computed_tokens

    def _piece(self, plan: _Plan, tokens: int) -> int:
        """How many of a request's tokens fit into the step."""
        limit = self.config.long_prefill_token_threshold or tokens
        return min(tokens, limit, plan.budget) if self.config.enable_chunked_prefill else tokens

    def _decode(self, plan: _Plan) -> None:
        """A token of each sequence that generates."""
        self._go_on(plan, [r for r in self.running if self._uncomputed(r) == 1 and r.request_id not in plan.tokens])

    def _prefill(self, plan: _Plan, now: float) -> None:
        """Pieces of prompts, of those that run and of those that begin, in the order of the policy."""
        for request in sorted([r for r in self.running if self._uncomputed(r) > 1], key=self._key):
            self._admit(plan, now, self._key(request))
            self._go_on(plan, [request])
        self._admit(plan, now)

    def _may_need_block(self, request: Request) -> bool:
        """Whether a sequence that runs may need one for its next token: forks may share the block that is written."""
        return request.num_computed_tokens >= self._room[request.request_id] or request.params.n > 1

    def _go_on(self, plan: _Plan, requests: list[Request]) -> None:
        """The next tokens of sequences that run; where their blocks don't suffice, the last of the order loses its."""
        writes: dict[str, Write] = {}
        for request in requests:
            if plan.budget < 1:
                break
            name, start = request.request_id, request.num_computed_tokens
            count = self._piece(plan, self._uncomputed(request))
            plan.take(request, count)
            if start + count > self._room[name] or request.params.n > 1:
                writes[name] = Write(name, start, start + count)
        while writes and not self.kv.reserve(list(writes.values())):
            plan.pressed = True
            victim = max(self.running, key=self._key)
            assert len(self.running) > 1, "a sequence is larger than the memory"
            writes.pop(victim.request_id, None)
            self._preempt(victim, plan)
        for name, write in writes.items():
            self._room[name] = max(self._room[name], self.kv.tables.pages(write.end) * self.kv.tables.page)

    def _admit(self, plan: _Plan, now: float, before: Key | None = None) -> None:
        """Those that wait, in the order of the policy, as far as blocks, budget and places allow; nobody is passed.

        With `before`, only those that go before it.
        """
        if self._held_back(now):
            return
        while self.queue and plan.budget > 0 and not plan.pressed:
            entry = self.queue[0]
            request = entry.requests[0]
            if before is not None and entry.key > before:
                return
            if (
                request.num_pending
                or not self._fits(request, plan.kept)
                or (entry.swapped and not self._arriving(request))
            ):
                return
            if entry.swapped:
                self._bring_back(entry, plan)
                continue
            count = self._piece(plan, request.num_tokens)
            if count > plan.budget and plan.requests:  # a whole prompt, in a step of its own
                return
            self._take_in(entry, count, plan)

    def _take_in(self, entry: _Waiting, count: int, plan: _Plan) -> None:
        """A prompt begins: all of its blocks are its own from now on, so that it can't get stuck half-way."""
        places = self._places()
        request, forks = entry.requests[0], entry.requests[1:places]
        self._reserve_all(request)
        self.queue.pop(0)
        if rest := entry.requests[places:]:
            self._enqueue(*rest)
        if forks:
            self._forks[request.request_id] = forks
        self.running.append(request)
        plan.take(request, count)

    def _bring_back(self, entry: _Waiting, plan: _Plan) -> None:
        """A swapped sequence gets blocks again, and its tokens into them."""
        assert self.swap is not None
        request = entry.requests[0]
        self.queue.pop(0)
        self._reserve_all(request)
        if not self.swap.back(request):  # lost: the store has said why
            self._release(request)
            self._forget_computed(request)
            self._enqueue(request)
            return
        self.running.append(request)
        plan.take(request, self._piece(plan, self._uncomputed(request)))

    def _commit(self, request: Request, plan: _Plan) -> ScheduledRequest:
        """What the step will have done is noted now; forks begin where the prompt ends."""
        start, count = request.num_computed_tokens, plan.tokens[request.request_id]
        complete = start + count >= request.num_tokens
        forks = tuple(self._forks.pop(request.request_id, ())) if complete else ()
        scheduled = ScheduledRequest(request, start, count, forks, max(0, start + count - request.num_tokens))
        request.num_computed_tokens = start + count
        if scheduled.samples:
            request.num_pending += 1
            for fork in forks:
                self.kv.fork(request, fork)
                self._room[fork.request_id] = self._room[request.request_id]
                fork.num_pending += 1
                self.running.append(fork)
        return scheduled

    # --- memory ---

    def _fits(self, request: Request, kept: int = 0) -> bool:
        if self._places() < 1:
            return False
        spare = self.spare + kept if self.running else 0
        return self.kv.tables.pages(request.num_tokens) + spare <= self.kv.num_free

    def _places(self) -> int:
        return self.most - len(self.running) - sum(map(len, self._forks.values()))

    def _arriving(self, request: Request) -> bool:
        """Whether its swapped blocks can be had; where nothing else runs, waiting for them is no loss."""
        assert self.swap is not None
        return self.swap.ready(request) or not self.running

    def _reserve_all(self, request: Request) -> None:
        name, end = request.request_id, request.num_tokens
        made = self.kv.reserve([Write(name, 0, end)])
        assert made, "admitted more than is free"
        self._room[name] = self.kv.tables.pages(end) * self.kv.tables.page

    def _make_way(self) -> None:
        """Preempt what runs behind the first of the queue, if that makes room for it."""
        if not self.policy.preemptive or self.config.preemption == "reject" or not self.queue:
            return
        entry = self.queue[0]
        request = entry.requests[0]
        if request.num_pending:
            return
        behind = sorted((r for r in self.running if self._gives_way(r, entry.key)), key=self._key)
        free = self.kv.num_free + self._held(behind)
        if not behind or self.kv.tables.pages(request.num_tokens) + self.spare > free:
            return
        while behind and not self._fits(request):
            self._preempt(behind.pop())

    def _gives_way(self, request: Request, key: Key) -> bool:
        """Whether a running request goes for one with this key: not for a gain that computing it again would eat up."""
        lost = request.num_computed_tokens if self.policy.in_tokens and self.swap is None else 0
        own, number = self._key(request)
        return (own - lost, number) > key

    def _held(self, requests: list[Request]) -> int:
        """Blocks that are free when all of these go: forks that stay keep what they share."""
        tables = self.kv.tables
        alone = sum(len(tables.tables[r.request_id]) for r in requests if r.params.n == 1)
        shared = Counter(b for r in requests if r.params.n > 1 for b in tables.tables[r.request_id])
        return alone + sum(tables.references[block] == count for block, count in shared.items())

    def _preempt(self, request: Request, plan: _Plan | None = None) -> None:
        """Take everything from a running sequence."""
        if plan is not None:
            plan.drop(request)
        if self.config.preemption == "reject":
            request.finish_reason, request.stop_reason = "abort", REJECTED
            self._leave(request)
            self._rejected.append(request)
            return
        self.preemptions += 1
        request.preemptions += 1
        if self.swap is not None and request.request_id not in self._forks and self.swap.out(request):
            self.running.remove(request)
            self._release(request)
            bisect.insort(self.queue, _Waiting(self._key(request), [request], swapped=True))
            return
        self._recompute(request)

    def _recompute(self, request: Request) -> None:
        """From running to waiting, with nothing computed; forks that had not begun go with it."""
        self.running.remove(request)
        self._release(request)
        self._forget_computed(request)
        self._enqueue(request, *self._forks.pop(request.request_id, ()))

    def _begin_anew(self, request: Request) -> None:
        """Compute everything again, whether it runs or is swapped; one that waits has nothing computed."""
        if request in self.running:
            self._recompute(request)
            return
        entry = next((e for e in self.queue if e.swapped and request in e.requests), None)
        if entry is not None and self.swap is not None:
            self.queue.remove(entry)
            self.swap.drop(request)
            self._forget_computed(request)
            self._enqueue(request)

    def _forget_computed(self, request: Request) -> None:
        self.recomputed_tokens += request.num_computed_tokens
        request.num_computed_tokens = 0

    def _release(self, request: Request) -> None:
        self.kv.release(request)
        self._room.pop(request.request_id, None)

    # --- the queue ---

    def _key(self, request: Request) -> Key:
        return self.policy.key(request), self._number[request.request_id]

    def _enqueue(self, request: Request, *others: Request) -> None:
        """By the policy's order; what has nothing but its prompt joins the rest of its group, if that is next."""
        entry = _Waiting(self._key(request), [request, *others])
        place = bisect.bisect(self.queue, entry)
        for neighbour in self.queue[max(0, place - 1) : place + 1]:
            if not neighbour.swapped and _same_prompt(neighbour.requests[0], request):
                neighbour.requests += entry.requests
                neighbour.requests.sort(key=lambda r: self._number[r.request_id])
                neighbour.key = self._key(neighbour.requests[0])
                return
        self.queue.insert(place, entry)

    def _leave(self, request: Request) -> None:
        """A request that has ended is nowhere any more."""
        number = self._number.pop(request.request_id)
        if request.deadline is not None:
            del self._deadlines[bisect.bisect_left(self._deadlines, (request.deadline, number), key=_due)]
        self._watchful -= _watches(request)
        if request in self.running:
            self.running.remove(request)
            self._release(request)
            if forks := self._forks.pop(request.request_id, None):  # its prompt was theirs
                self._enqueue(*forks)
            return
        for entry in self.queue:
            if request in entry.requests:
                self.queue.remove(entry)
                if entry.swapped and self.swap is not None:
                    self.swap.drop(request)
                if rest := [other for other in entry.requests if other is not request]:
                    self._enqueue(*rest)
                return
        for forks in self._forks.values():
            if request in forks:
                forks.remove(request)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self._deadlines[0][2]
            request.finish_reason, request.stop_reason = "abort", LATE
            self._leave(request)
            self._rejected.append(request)

    def _held_back(self, now: float) -> float:
        """Seconds for which an idle engine lets requests gather."""
        wait = self.config.batch_wait
        if not wait or self.running or self._rejected or not self.queue:
            return 0.0
        waiting = self.waiting
        if len(waiting) >= self.config.batch_size or any(r.num_computed_tokens for r in waiting):
            return 0.0
        return max(0.0, min(r.arrival for r in waiting) + wait - now)


def _due(entry: tuple[float, int, Request]) -> tuple[float, int]:
    return entry[:2]


def _watches(request: Request) -> bool:
    params = request.params
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _same_prompt(request: Request, other: Request) -> bool:
    """Whether the two are of one group and have nothing but their prompt."""
    return (
        bool(request.group)
        and request.group == other.group
        and not (request.output_token_ids or other.output_token_ids or request.num_pending or other.num_pending)
    )
