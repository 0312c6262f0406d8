"""What the gates of task 4.1 count: steps, places, blocks and waits of a scheduler in simulation."""

from __future__ import annotations

import itertools

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase4_scheduler.measures.gates_simulated import ROOM, Arrival, Simulated

SHORT, LONG = 10, 200  # tokens of an answer
PLACES = 8
MIXED = [Arrival(0, 16, length) for length in (SHORT, LONG) * 64]


def steps_over_fewest(use: Use) -> Measured:
    """Steps for 64 short and 64 long answers in 8 places, over the tokens of them all in full places."""
    run = _mixed(use)
    fewest = sum(arrival.answer for arrival in MIXED) / PLACES
    return Measured(len(run.steps) / fewest, f"{len(run.steps)} steps, {fewest:.0f} are needed")


def empty_places(use: Use) -> Measured:
    """Per cent of the places without a token, of the steps before which somebody waited."""
    run = _mixed(use)
    last = max(min(steps) for steps in run.sampled.values())  # after it nobody waits
    used = sum(len(step.sampling) for step in run.steps[:last])
    return Measured(100 * (1 - used / (last * PLACES)), f"{last * PLACES - used} of {last * PLACES} places")


def over_budget(use: Use) -> Measured:
    """Tokens of the largest step over `max_num_batched_tokens`, when prompts of 20 to 500 tokens come."""
    budget = 64
    run = Simulated(use, {"max_num_seqs": 6, "max_num_batched_tokens": budget})
    run.run([Arrival(i, length, 20) for i, length in enumerate((20, 300, 500, 40, 64, 65) * 3)])
    most = max(step.num_tokens for step in run.steps)
    return Measured(most / budget, f"{most} tokens, {budget} are allowed")


def longest_stall(use: Use) -> Measured:
    """Most steps from a token of an answer to its next, when long prompts come together and one after the other."""
    run = Simulated(use, {"max_num_seqs": PLACES, "max_num_batched_tokens": 64})
    together = [Arrival(0, 60, 100) for _ in range(4)]
    run.run([*together, *(Arrival(10 + 20 * i, 400, 30) for i in range(4))])
    gaps = [b - a for steps in run.sampled.values() for a, b in itertools.pairwise(steps)]
    return Measured(max(gaps), f"{len(run.steps)} steps, prompts of 60 and 400 tokens under a budget of 64")


def newcomers_wait(use: Use) -> float:
    """Steps to the first token of a request that comes while long answers are under way, and one place is free."""
    run = Simulated(use, {"max_num_seqs": 4, "max_num_batched_tokens": 64})
    run.run([*(Arrival(0, 16, LONG) for _ in range(3)), Arrival(20, 30, 5)])
    return run.first["3"] - 20


def running_together(use: Use) -> Measured:
    """Mean sequences in a step over those of the framework, in memory for three answers of the length allowed.

    Each may have 170 tokens and ends after 10 to 40: who reserves the longest reserves it in vain.
    """
    arrivals = [Arrival(0, 8 + i % 16, 10 + 7 * i % 31, most=170) for i in range(64)]

    def mean(parts: Use) -> float:
        run = Simulated(parts, {"max_num_seqs": 64, "max_num_batched_tokens": 256}, num_blocks=40)
        run.run(arrivals)
        return sum(len(step.requests) for step in run.steps) / len(run.steps)

    ours, theirs = mean(use), mean(use.choose(ROOM, "framework"))
    return Measured(ours / theirs, f"{ours:.1f} sequences, reserving the longest {theirs:.1f}")


def first_batch(use: Use) -> Measured:
    """Sequences in the first step of an idle engine that may wait a second for four: four come, and a fifth later.

    -1 where somebody for whom no company comes waits for longer than the second.
    """
    patient = {"batch_size": 4, "batch_wait": 1.0}
    run = Simulated(use, patient, step_seconds=0.05)
    run.run([Arrival(10 + after, 16, 20) for after in (0, 0.1, 0.2, 0.3, 0.6)])
    alone = Simulated(use, patient, step_seconds=0.05)
    alone.run([Arrival(10, 16, 20)])
    count = len(run.steps[0].requests) if alone.begun[0] <= 11.0 else -1
    return Measured(count, f"after {run.begun[0] - 10:.2f} s; alone: {alone.begun[0] - 10:.2f} s")


def _mixed(use: Use) -> Simulated:
    run = Simulated(use, {"max_num_seqs": PLACES, "max_num_batched_tokens": 256})
    run.run(MIXED)
    return run
