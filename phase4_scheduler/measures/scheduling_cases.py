"""Benchmark cases of the scheduler and the loop without a model: speed, policies, one step ahead."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.course.parts import Use, resolve
from module0_profiling.results import Figure
from phase1_memory.allocator import make_allocator
from phase4_scheduler.engine import ROOM
from phase4_scheduler.measures.simulated import BLOCK, Cost, Job, Outcome, Simulated, request_of, simulate
from phase4_scheduler.memory import CountedMemory
from phase4_scheduler.null_executor import NullExecutor, NullLaunched
from phase4_scheduler.scheduler_config import POLICIES, SchedulerConfig

RUNNING = (64, 256, 1024)
PLACES = 16  # sequences that run together where policies are compared
SHORT, LONG, PROMPT = 10, 200, 128
LOAD = 0.9  # of what the machine can do: queues grow near saturation, and without end beyond it
URGENT = 10  # percent of the requests
AGEING = 100.0  # tokens of work that a second of waiting is worth
COST = Cost()
HOST_COSTS = (0.0005, 0.002, 0.005)  # seconds of Python between two steps
STEP = 0.01


def _part(name: str, use: str) -> Any:
    return resolve(ROOM, name, Use.parse(use))


def scheduler_speed(options: Options) -> tuple[Figure, ...]:
    """Steps/s of the scheduler alone: `next_step` and `finish` with so many sequences that generate."""
    make, steps = _part("scheduler", "phase4=solution").Scheduler, options.size(300, 3)
    figures: list[Figure] = []
    for running in RUNNING[: options.size(len(RUNNING), 1)]:
        rates = [_speed(make, running, steps) for _ in range(options.rounds)]
        figures.append(figure(f"{running} running/steps", rates, "steps/s"))
        figures.append(figure(f"{running} running/a step", [1e6 / rate for rate in rates], "us"))
        figures.append(figure(f"{running} running/of a sequence", [1e6 / rate / running for rate in rates], "us"))
    return tuple(figures)


def _speed(make: Any, running: int, steps: int) -> float:
    """Steps a second of decodes, blocks for new tokens included."""
    output = steps + 8
    config = SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=2 * running * BLOCK)
    memory = CountedMemory(make_allocator(running * (2 + output // BLOCK) + running), BLOCK)
    scheduler = make(memory, config)
    for i in range(running):
        scheduler.add(request_of(str(i), Job(0.0, BLOCK, output)))
    while not (step := scheduler.next_step()).scheduled or step.num_tokens != running:  # prompts
        scheduler.finish(step, _zeros(step))
    scheduler.finish(step, _zeros(step))
    gc.collect()
    began = time.perf_counter()
    for _ in range(steps):
        step = scheduler.next_step()
        scheduler.finish(step, _zeros(step))
    return steps / (time.perf_counter() - began)


def _zeros(step: Any) -> list[list[int]]:
    sampling = {request.request_id for request in step.sampling}
    return [[0] if request.request_id in sampling else [] for request in step.requests]


def policies(options: Options) -> tuple[Figure, ...]:
    """Waiting by policy: short and long answers at random times, 90 % of what continuous batches can take.

    Simulated: nothing here depends on the machine. "wait" is the time to the first token.
    """
    figures: list[Figure] = []
    count = options.size(2000, 40)
    solution = _part("scheduler", "phase4=solution").Scheduler
    capacity = _capacity(solution, count)
    figures.append(
        Figure("saturation", capacity, "requests/s", note=f"{PLACES} places, {COST.step * 1e3:.0f} ms a step")
    )
    trace = jobs(count, LOAD * capacity)
    for policy in POLICIES:
        config = SchedulerConfig(max_num_seqs=PLACES, scheduling_policy=policy, ageing_rate=AGEING)
        figures += _waits(policy, simulate(trace, config, COST, make=solution))
    static = _part("scheduler", "phase4=framework").Scheduler
    config = SchedulerConfig(max_num_seqs=PLACES)
    figures += _waits("static batches", simulate(trace, config, COST, make=static))
    figures.append(Figure("saturation of static batches", _capacity(static, count), "requests/s"))
    return tuple(figures)


def jobs(count: int, rate: float, seed: int = 0) -> list[Job]:
    """Half short, half long answers, some of them urgent, that arrive at random (Poisson) at `rate` a second.

    `rate` 0: all at once.
    """
    dice, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += dice.expovariate(rate) if rate else 0.0
        output = dice.choice((SHORT, LONG))
        found.append(Job(now, PROMPT, output, 0 if dice.randrange(100) < URGENT else 1))
    return found


def _capacity(make: Any, count: int) -> float:
    """Requests a second when all are there from the start."""
    return count / simulate(jobs(count, 0.0), SchedulerConfig(max_num_seqs=PLACES), COST, make=make).seconds


def _waits(name: str, done: Simulated) -> list[Figure]:
    kinds: dict[str, list[Outcome]] = {
        "all": list(done.outcomes),
        "short": [o for o in done.outcomes if o.job.output == SHORT],
        "long": [o for o in done.outcomes if o.job.output == LONG],
        "urgent": [o for o in done.outcomes if o.job.priority == 0],
    }
    figures = []
    for kind, outcomes in kinds.items():
        waits = sorted(outcome.first for outcome in outcomes)
        figures.append(Figure(f"{name}/{kind}, mean wait", statistics.fmean(waits), "s"))
        figures.append(Figure(f"{name}/{kind}, p99", percentile(waits, 0.99), "s"))
        figures.append(Figure(f"{name}/{kind}, longest", waits[-1], "s"))
    figures.append(Figure(f"{name}/mean time to the end", statistics.fmean(o.last for o in done.outcomes), "s"))
    figures.append(Figure(f"{name}/preemptions", done.preemptions, ""))
    return figures


def percentile(ascending: Sequence[float], share: float) -> float:
    """The value below which so many of them are, of sorted ones."""
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


def async_steps(options: Options) -> tuple[Figure, ...]:
    """Share of the time in which the device computes, with steps of 10 ms and so much Python between them.

    The device is an executor that takes its time on its own. Busy is what it was asked to do over what went by.
    """
    figures: list[Figure] = []
    steps = options.size(100, 5)
    module = _part("loop", "phase4=solution")
    for host in HOST_COSTS[: options.size(len(HOST_COSTS), 1)]:
        found: dict[str, list[float]] = {"one after the other": [], "one ahead": []}
        for _ in range(options.rounds):
            found["one after the other"].append(_busy(module.Loop, host, steps))
            found["one ahead"].append(_busy(module.AheadLoop, host, steps))
        row = f"{host * 1e3:g} ms of host"
        for name, shares in found.items():
            figures.append(figure(f"{row}/{name}", [100 * share for share in shares], "% busy"))
        figures.append(ratio(f"{row}/speedup", found["one ahead"], found["one after the other"]))
    return tuple(figures)


class _HostWork(NullExecutor):
    """Every launch costs Python some time first, as building a batch and queueing kernels does."""

    def __init__(self, host: float) -> None:
        super().__init__(STEP)
        self.host, self.launched = host, 0

    def launch(self, step: Any, before: NullLaunched | None = None) -> NullLaunched:
        """See `NullExecutor`."""
        until = time.perf_counter() + self.host
        while time.perf_counter() < until:
            pass
        self.launched += 1
        return super().launch(step, before)


def _busy(make_loop: Any, host: float, steps: int) -> float:
    """Time that steps took over the time that went by, 0..1."""
    memory = CountedMemory(make_allocator(256), BLOCK)
    executor = _HostWork(host)
    loop = make_loop(_part("scheduler", "phase4=solution").Scheduler(memory, SchedulerConfig()), executor)
    for i in range(8):
        loop.scheduler.add(request_of(str(i), Job(0.0, BLOCK, steps + 50)))
    for _ in range(4):
        loop.step()
    first, began = executor.launched, time.perf_counter()
    for _ in range(steps):
        loop.step()
    return (executor.launched - first) * STEP / (time.perf_counter() - began)
