"""What the gates of task 4.2 count: who waits how long under which order, in simulation.

A step takes a second and gives a token to everybody who runs, so waits are steps.
"""

from __future__ import annotations

import random
import statistics

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase4_scheduler.measures.gates_simulated import Arrival, Simulated

SHORT, LONG = 10, 200
CROWDS = 20


def shortest_first(use: Use) -> Measured:
    """Mean wait with "sjf" over that by arrival: 16 short and 16 long answers wait for one place."""
    return _over_arrival(use, {"scheduling_policy": "sjf"})


def ageing(use: Use) -> Measured:
    """The same with "ageing", where a second of waiting is worth a token of work."""
    return _over_arrival(use, {"scheduling_policy": "ageing", "ageing_rate": 1.0})


def passed_too_late(use: Use) -> Measured:
    """Requests that got their first token before one that had come more than work / rate seconds earlier: ageing.

    On random traces, and under a stream of short requests that lets nobody else in where the shortest goes first.
    """
    rate, late, longest = 4.0, 0, 0.0
    dice = random.Random(4)
    crowds = [
        [Arrival(dice.uniform(1, 300), dice.choice((4, 40)), dice.choice((SHORT, LONG))) for _ in range(25)]
        for _ in range(CROWDS)
    ]
    stream = [Arrival(1, 10, LONG), *(Arrival(0.9 * i * SHORT, 1, SHORT) for i in range(100))]
    for places, trace in [*((2, crowd) for crowd in crowds), (1, stream)]:
        run = Simulated(use, {"max_num_seqs": places, "scheduling_policy": "ageing", "ageing_rate": rate})
        run.run(trace)
        longest = max(longest, *run.waits())
        for request in run.requests:
            bound = request.arrival + (len(request.prompt_token_ids) + request.max_tokens) / rate
            late += sum(
                other.arrival > bound and run.first[other.request_id] < run.first[request.request_id]
                for other in run.requests
            )
    return Measured(late, f"{CROWDS + 1} traces; the longest wait is {longest:.0f} s")


def urgent_wait(use: Use) -> Measured:
    """Steps to the first token of an urgent request, when less urgent ones have all places and others wait."""
    run = Simulated(use, {"max_num_seqs": 4, "scheduling_policy": "priority"})
    run.run([*(Arrival(0, 16, LONG, priority=5) for _ in range(8)), Arrival(20, 16, SHORT, priority=0)])
    return Measured(run.first["8"] - 20, f"{run.scheduler.preemptions} preemptions")


def out_of_order(use: Use) -> float:
    """Pairs of requests of which the less urgent began first, though both had waited: "priority", one place."""
    dice = random.Random(1)
    run = Simulated(use, {"max_num_seqs": 1, "scheduling_policy": "priority"})
    run.run(
        [Arrival(0, 16, SHORT, priority=-9), *(Arrival(1, 16, SHORT, priority=dice.randint(0, 5)) for _ in range(24))]
    )
    first = [(run.first[r.request_id], r.priority, r.arrival) for r in run.requests[1:]]
    return float(sum(a[0] < b[0] and a[1] > b[1] for a in first for b in first))


def _over_arrival(use: Use, settings: dict[str, object]) -> Measured:
    lengths = [SHORT, LONG] * 16
    random.Random(0).shuffle(lengths)

    def mean(policy: dict[str, object]) -> float:
        run = Simulated(use, {"max_num_seqs": 1, **policy})
        run.run([Arrival(0, 1, length) for length in lengths])
        return statistics.fmean(run.waits())

    ours, theirs = mean(settings), mean({"scheduling_policy": "fcfs"})
    return Measured(ours / theirs, f"{ours:,.0f} steps, by arrival {theirs:,.0f}")
