"""Replays a trace against a policy: what the memory holds at every step, who waits, and what running out of it costs.

A step of the simulated engine:

    1. requests that have generated everything leave
    2. requests whose slots are full get more, the oldest first; while one gets none, the youngest is preempted
    3. unless one was preempted, waiting requests join in the order of their arrival, as long as the first of them fits
    4. every running request stores a token

The memory of a step is divided as in figure 2 of the PagedAttention paper (Kwon et al., 2023, arXiv 2309.06180). Every
slot is of one kind:

    stored     holds a token
    reserved   given to a request that will fill it later (the trace knows)
    internal   given to a request that will never fill it: internal fragmentation
    external   free, and there is enough of it for the first that waits, but not in one run: external fragmentation
    free       free otherwise

`fragmentation` is the share of what was given out that holds no token: (reserved + internal) / (memory - free -
external). `waste` is the share of the memory that is reserved, internal or external.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from phase1_memory.memory_map import MemorySnapshot
from phase1_memory.policies import Policy
from phase1_memory.traces import Job, Trace

PRESSURES = ("recompute", "swap", "reject")
PIECES_EVERY = 50  # steps between two looks at how scattered the requests are


@dataclass(frozen=True)
class Costs:
    """How long a preempted request holds memory without growing when it comes back; 0 tokens a step: no time at all.

    Attributes:
        bytes_per_token: of keys and values; the default is Llama-3-8B's in bfloat16 (32 layers, 8 heads of 128).
        recompute: tokens that are computed again in a step.
        swap: tokens that are brought back from host memory in a step.
    """

    bytes_per_token: int = 32 * 2 * 8 * 128 * 2
    recompute: int = 2048
    swap: int = 4096


@dataclass(frozen=True)
class Setup:
    """The simulated engine.

    Attributes:
        pressure: what happens to the youngest when memory runs out: "recompute", "swap" or "reject" (it is ended).
        max_num_seqs: requests that run together at most.
        max_model_len: tokens of a request at most; longer ones end there, longer prompts are rejected.
        max_steps: the replay ends here at the latest.
    """

    pressure: str = "recompute"
    max_num_seqs: int = 4096
    max_model_len: int = 2048
    max_steps: int = 1_000_000
    costs: Costs = Costs()

    def __post_init__(self) -> None:
        if self.pressure not in PRESSURES:
            raise ValueError(f"pressure {self.pressure!r}: one of {', '.join(PRESSURES)}")


class Moment(NamedTuple):
    """One step: slots of each kind, requests, and the seconds that the policy took."""

    step: int
    stored: int
    reserved: int
    internal: int
    external: int
    free: int
    running: int
    waiting: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """A replay in numbers; shares are means over its steps.

    Attributes:
        policy, trace: names.
        steps: in which anything ran or waited.
        stored, reserved, internal, external: shares of the memory.
        fragmentation: of what was given out, the share that holds no token.
        mean_batch, largest_batch: requests that run.
        finished: requests that generated everything.
        rejected: requests that can never fit, and with "reject" those that were ended for lack of memory.
        tokens: that were generated, recomputed ones not counted again.
        preemptions, recomputed_tokens, swapped_bytes: the price of running out; bytes out and in.
        copied_tokens: moved within the memory so that a request stays in one run.
        pieces: runs of neighbouring blocks a request is made of.
        median_seconds, p99_seconds: of the policy's own work in a step.
    """

    policy: str
    trace: str
    steps: int
    stored: float
    reserved: float
    internal: float
    external: float
    fragmentation: float
    mean_batch: float
    largest_batch: int
    finished: int
    rejected: int
    tokens: int
    preemptions: int
    recomputed_tokens: int
    swapped_bytes: int
    copied_tokens: int
    pieces: float
    median_seconds: float
    p99_seconds: float

    @property
    def waste(self) -> float:
        """Share of the memory that is reserved or lost to fragmentation."""
        return self.reserved + self.internal + self.external

    def outcome(self) -> tuple[object, ...]:
        """Everything but the times, which no two runs share."""
        return tuple(getattr(self, field.name) for field in fields(self) if not field.name.endswith("_seconds"))


@dataclass(frozen=True)
class Simulation:
    """A summary and the steps it is made of."""

    summary: Summary
    moments: tuple[Moment, ...]


def simulate(trace: Trace, policy: Policy, setup: Setup = Setup()) -> Simulation:
    """Replay the whole trace, or its first `setup.max_steps` steps. The policy's memory must be empty."""
    replay = Replay(trace, policy, setup)
    while replay.advance():
        pass
    return replay.result()


def snapshot_at(trace: Trace, policy: Policy, setup: Setup, step: int) -> MemorySnapshot:
    """The memory after step `step`, or at the last step that a shorter trace has."""
    replay = Replay(trace, policy, setup)
    found = replay.snapshot()
    while replay.now <= step and replay.advance():
        found = replay.snapshot()
    return found


class Replay:
    """A replay in progress.

    Attributes:
        now: the next step.
        moments: the steps so far.
        stored: tokens of each request, int64 [jobs]; what it generated is kept while it is preempted.
        held: slots that it has, int64 [jobs].
        waiting: requests without memory, the first to join first.
    """

    def __init__(self, trace: Trace, policy: Policy, setup: Setup) -> None:
        self._name, self._policy, self._setup = trace.name, policy, setup
        self._jobs = [_clipped(job, setup.max_model_len) for job in trace.jobs]
        count = len(self._jobs)
        self.stored = np.array([job.prompt for job in self._jobs], np.int64)
        self.held = np.zeros(count, np.int64)
        self._total = np.array([job.total for job in self._jobs], np.int64)
        self._running = np.zeros(count, bool)
        self._resumes = np.zeros(count, np.int64)  # the step in which it grows again
        self._preempted = np.zeros(count, bool)
        self.waiting: deque[int] = deque()
        self._arrived = self.now = 0
        self.moments: list[Moment] = []
        self._pieces: list[float] = []
        self.finished = self.rejected = self.preemptions = self.recomputed_tokens = self.swapped_tokens = 0
        self.tokens = 0
        self._seconds = 0.0

    def advance(self) -> bool:
        """One step; False, and nothing happens, when everything has ended or `max_steps` are over."""
        self._seconds = 0.0
        live = np.flatnonzero(self._running)
        ended = live[self.stored[live] == self._total[live]]
        self._skip_idle(len(live) - len(ended))
        if self.now >= self._setup.max_steps or (not len(live) and not self.waiting and not self._more_to_come()):
            return False
        self._arrive()
        self.finished += len(ended)
        self._release(ended.tolist())
        if not self._grow():
            self._admit()
        live = np.flatnonzero(self._running)
        growing = live[self._resumes[live] <= self.now]
        self.stored[growing] += 1
        self.tokens += len(growing)
        if len(live) or self.waiting:
            self._record(live)
        self.now += 1
        return True

    def snapshot(self) -> MemorySnapshot:
        """The memory after the last step; requests are named r0, r1 ... in the order of their arrival."""
        policy = self._policy
        tables = {f"r{request}": tuple(blocks) for request, blocks in sorted(policy.tables.items())}
        taken = {block for blocks in tables.values() for block in blocks}
        return MemorySnapshot(
            num_blocks=policy.num_blocks,
            page=policy.page,
            tables=tables,
            lengths={f"r{request}": int(self.stored[request]) for request in sorted(policy.tables)},
            free=tuple(block for block in range(policy.num_blocks) if block not in taken),
        )

    def result(self) -> Simulation:
        """The replay so far."""
        columns = {name: np.array([getattr(m, name) for m in self.moments]) for name in Moment._fields}
        capacity = self._policy.num_blocks * self._policy.page
        given = columns["stored"] + columns["reserved"] + columns["internal"]
        seconds = columns["seconds"] if self.moments else np.zeros(1)
        summary = Summary(
            policy=self._policy.name,
            trace=self._name,
            steps=len(self.moments),
            stored=_mean(columns["stored"] / capacity),
            reserved=_mean(columns["reserved"] / capacity),
            internal=_mean(columns["internal"] / capacity),
            external=_mean(columns["external"] / capacity),
            fragmentation=float(1 - columns["stored"].sum() / given.sum()) if given.sum() else 0.0,
            mean_batch=_mean(columns["running"]),
            largest_batch=int(columns["running"].max(initial=0)),
            finished=self.finished,
            rejected=self.rejected,
            tokens=self.tokens,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed_tokens,
            swapped_bytes=self.swapped_tokens * self._setup.costs.bytes_per_token,
            copied_tokens=self._policy.copied_tokens,
            pieces=statistics.fmean(self._pieces) if self._pieces else 0.0,
            median_seconds=float(np.median(seconds)),
            p99_seconds=float(np.percentile(seconds, 99)),
        )
        return Simulation(summary, tuple(self.moments))

    def _more_to_come(self) -> bool:
        return self._arrived < len(self._jobs)

    def _skip_idle(self, busy: int) -> None:
        """Nobody runs on and nobody waits: go to the next arrival at once."""
        if not busy and not self.waiting and self._more_to_come():
            self.now = max(self.now, self._jobs[self._arrived].arrival)

    def _arrive(self) -> None:
        while self._more_to_come() and self._jobs[self._arrived].arrival <= self.now:
            self.waiting.append(self._arrived)
            self._arrived += 1

    def _release(self, requests: Sequence[int]) -> None:
        began = time.perf_counter()
        self._policy.release(requests)
        self._seconds += time.perf_counter() - began
        self._running[requests] = False
        self.held[requests] = 0

    def _grow(self) -> bool:
        """Slots for every request that has none left; whether somebody was preempted for it."""
        live = np.flatnonzero(self._running)
        full = live[(self.stored[live] == self.held[live]) & (self._resumes[live] <= self.now)].tolist()
        if not full:
            return False
        refused = [request for request, given in zip(full, self._ask(full), strict=True) if not given]
        for request in refused:
            while self._running[request] and not self._ask([request])[0]:
                self._preempt(int(np.flatnonzero(self._running)[-1]))
        return bool(refused)

    def _ask(self, requests: list[int]) -> list[bool]:
        began = time.perf_counter()
        answers = self._policy.grow(requests)
        self._seconds += time.perf_counter() - began
        for request, given in zip(requests, answers, strict=True):
            if given:
                self.held[request] = len(self._policy.tables[request]) * self._policy.page
        return answers

    def _preempt(self, request: int) -> None:
        pressure, tokens = self._setup.pressure, int(self.stored[request])
        self._release([request])
        if pressure == "reject":
            self.rejected += 1
            return
        self.preemptions += 1
        self._preempted[request] = True
        self.waiting.appendleft(request)
        if pressure == "recompute":
            self.recomputed_tokens += tokens
        else:
            self.swapped_tokens += 2 * tokens  # out now, in when it comes back

    def _admit(self) -> None:
        places = self._setup.max_num_seqs - int(self._running.sum())
        while self.waiting and places > 0:
            request = self.waiting[0]
            job, tokens = self._jobs[request], int(self.stored[request]) + 1
            if job.output < 1 or not self._policy.fits(job, tokens):
                self.rejected += 1
                self.waiting.popleft()
                continue
            began = time.perf_counter()
            admitted = self._policy.admit(request, job, tokens)
            self._seconds += time.perf_counter() - began
            if not admitted:
                return
            self.waiting.popleft()
            self._start(request, tokens - 1)
            places -= 1

    def _start(self, request: int, tokens: int) -> None:
        self._running[request] = True
        self.held[request] = len(self._policy.tables[request]) * self._policy.page
        costs = self._setup.costs
        rate = costs.swap if self._setup.pressure == "swap" else costs.recompute
        stall = -(-tokens // rate) if self._preempted[request] and rate else 0
        self._resumes[request] = self.now + stall

    def _record(self, live: np.ndarray) -> None:
        policy = self._policy
        stored, held = int(self.stored[live].sum()), int(self.held[live].sum())
        used_once = int(np.minimum(self.held[live], self._total[live]).sum())
        free, external = policy.num_blocks * policy.page - held, 0
        if self.waiting and len(live) < self._setup.max_num_seqs:
            first = self.waiting[0]
            if policy.in_pieces(self._jobs[first], int(self.stored[first]) + 1):
                free, external = 0, free
        kinds = (stored, used_once - stored, held - used_once, external, free)
        self.moments.append(Moment(self.now, *kinds, len(live), len(self.waiting), self._seconds))
        if policy.tables and len(self.moments) % PIECES_EVERY == 1:
            self._pieces.append(statistics.fmean(_pieces(table) for table in policy.tables.values()))


def _pieces(table: Sequence[int]) -> int:
    """Runs of blocks in which each is followed by its neighbour."""
    return 1 if isinstance(table, range) else 1 + sum(after != block + 1 for block, after in pairwise(table))


def _clipped(job: Job, limit: int) -> Job:
    """A job within the model's length; no output is left to one whose prompt is too long."""
    return Job(job.arrival, job.prompt, max(0, min(job.output, limit - job.prompt)))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
