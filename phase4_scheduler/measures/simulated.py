"""A scheduler on a simulated clock: a step takes as long as it is said to, and thousands of seconds pass in one.

The scheduler is the real one, on a memory that only counts. Tokens are zeros; every answer ends by its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import Step
from phase1_memory.allocator import make_allocator
from phase4_scheduler.memory import CountedMemory
from phase4_scheduler.scheduler_config import SchedulerConfig

BLOCK = 16


@dataclass(frozen=True)
class Job:
    """A request that will come.

    Attributes:
        arrival: seconds.
        prompt, output: tokens.
        priority: smaller is more urgent.
    """

    arrival: float
    prompt: int
    output: int
    priority: int = 0


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: a part that every step has, as the weights are read, and one for each of its tokens."""

    step: float = 0.010
    token: float = 0.0001

    def of(self, step: Step) -> float:
        """Of this step."""
        return self.step + self.token * step.num_tokens


@dataclass(frozen=True)
class Outcome:
    """What became of a job: seconds from its arrival to its first token and to its last."""

    job: Job
    first: float
    last: float


@dataclass(frozen=True)
class Simulated:
    """A simulation that is over.

    Attributes:
        outcomes: in the order of the jobs.
        seconds: of the simulated clock.
        steps: forward passes.
        preemptions: see the scheduler.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float
    steps: int
    preemptions: int


def simulate(
    jobs: Sequence[Job],
    config: SchedulerConfig,
    cost: Cost,
    *,
    make: Callable[..., Any],
    blocks: int | None = None,
) -> Simulated:
    """Run jobs through a scheduler, one step after the other, until all have ended.

    Args:
        jobs: ascending by arrival.
        config: of the scheduler.
        cost: of steps.
        make: the class `Scheduler`, of the solution, the framework or a learner.
        blocks: of the memory; None: as many as all that run together could need.
    """
    now = 0.0
    longest = max(job.prompt + job.output for job in jobs)
    blocks = blocks or config.max_num_seqs * -(-longest // BLOCK) + config.max_num_seqs
    scheduler = make(CountedMemory(make_allocator(blocks), BLOCK), config, None, lambda: now)
    requests = [request_of(str(i), job) for i, job in enumerate(jobs)]
    first, last = [0.0] * len(jobs), [0.0] * len(jobs)
    coming = steps = 0
    while coming < len(jobs) or scheduler.has_unfinished():
        while coming < len(jobs) and (jobs[coming].arrival <= now or not scheduler.has_unfinished()):
            now = max(now, jobs[coming].arrival)
            scheduler.add(requests[coming])
            coming += 1
        step = scheduler.next_step()
        assert step.scheduled, "a step with nothing in it, though somebody waits"
        now += cost.of(step)
        steps += 1
        sampling = {request.request_id for request in step.sampling}
        ended = scheduler.finish(step, [[0] if r.request_id in sampling else [] for r in step.requests])
        for request in step.sampling:
            place = int(request.request_id)
            first[place] = first[place] or now
        for request in ended:
            last[int(request.request_id)] = now
    outcomes = tuple(
        Outcome(job, a - job.arrival, b - job.arrival) for job, a, b in zip(jobs, first, last, strict=True)
    )
    return Simulated(outcomes, now, steps, scheduler.preemptions)


def request_of(name: str, job: Job) -> Request:
    """A job as a scheduler wants it."""
    params = SamplingParams(temperature=0, max_tokens=job.output, ignore_eos=True)
    request = Request(name, [1] * job.prompt, params, 0, (), job.output, priority=job.priority)
    request.arrival = job.arrival
    return request
