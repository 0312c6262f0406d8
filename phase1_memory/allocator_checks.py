"""What the gates of the allocators measure: a thousand requests that grow, and what serves them.

The workload is that of a server under full load. There are always 1000 requests. Each begins with a prompt of 1 to 30
blocks, takes one block more every 16 steps, for a block holds 16 tokens, and ends after 338 tokens on average, the mean
of ShareGPT's answers (Kwon et al., 2023, arXiv 2309.06180, section 6.1), whereupon a new one takes its place. So a step
wants about 62 single blocks and three prompts.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use, resolve
from module0_profiling.timing import Timing, interleave, ratio
from phase1_memory.allocator import BuddyAllocator
from phase1_memory.block_tables import runs_of
from phase1_memory.runs import Allocator, Run, Want
from phase1_memory.rust_allocator import RustBuddyAllocator, rows

REQUESTS = 1000
PAGE = 16
LONGEST_PROMPT = 30  # blocks; all lengths from 1 are equally likely
MEAN_OUTPUT = 338  # tokens
MEAN_BLOCKS = (1 + LONGEST_PROMPT) / 2 + MEAN_OUTPUT / PAGE  # that a request has when one looks
FILL = 0.8  # share of the blocks that are taken on average
HEADROOM = 64
SETTLED = 1000  # steps after which nothing is left of how it began: three times the life of a request
ROUNDS = 5

Question = tuple[list[Run], list[Want]]
Make = Callable[[int], Allocator]


@dataclass(eq=False)
class Growing:
    """One request: its blocks, and the steps (modulo PAGE) at which it needs one more."""

    blocks: list[int]
    phase: int


class Scenario:
    """The workload, against one allocator.

    Args:
        allocator: serves it.
        requests: at any time.
        seed: of lengths and ends. Which requests come and go does not depend on the allocator.

    Attributes:
        asked: what was asked of the allocator, by step.
        live: the requests, oldest first.
        freed: blocks that go back with the next step.
        refused: wants that did not fit; the request that wanted is ended.
    """

    def __init__(self, allocator: Allocator, requests: int = REQUESTS, seed: int = 0) -> None:
        self.allocator, self.requests = allocator, requests
        self.asked: list[Question] = []
        self.live: list[Growing] = []
        self.refused = 0
        self.freed: list[int] = []
        self._dice = random.Random(seed)

    def run(self, steps: int) -> Self:
        """Go on for so many steps."""
        for _ in range(steps):
            self._step(len(self.asked))
        return self

    def runs_per_request(self) -> float:
        """Mean number of pieces that a request lies in."""
        return statistics.mean(1 + sum(b - a != 1 for a, b in pairwise(it.blocks)) for it in self.live)

    def holes(self) -> list[Run]:
        """Free blocks as runs of neighbours, whatever the allocator makes of them."""
        taken = {block for it in self.live for block in it.blocks}
        return runs_of([block for block in range(self.allocator.num_blocks) if block not in taken])

    def _step(self, now: int) -> None:
        stay: list[Growing] = []
        for it in self.live:
            if self._dice.random() < 1 / MEAN_OUTPUT:
                self.freed += it.blocks
            else:
                stay.append(it)
        growing = [it for it in stay if (now + it.phase) % PAGE == 0]
        new = [Growing([], self._dice.randrange(PAGE)) for _ in range(self.requests - len(stay))]
        wanted = [Want(1, it.blocks[-1]) for it in growing]
        wanted += [Want(self._dice.randint(1, LONGEST_PROMPT)) for _ in new]
        release, self.freed, self.live = runs_of(self.freed), [], stay + new
        self.asked.append((release, wanted))
        for it, found in zip([*growing, *new], self.allocator.step(release, wanted), strict=True):
            if found is None:
                self.refused += 1
                self.freed += it.blocks
                self.live.remove(it)
            for start, length in found or ():
                it.blocks += range(start, start + length)


def blocks_for(fill: float, requests: int = REQUESTS) -> int:
    """Blocks of which the workload takes this share on average."""
    return round(requests * MEAN_BLOCKS / fill)


def settled(make: Make, fill: float = FILL, requests: int = REQUESTS, steps: int = SETTLED) -> Scenario:
    """The workload after so many steps with the allocator that `make` makes of a number of blocks."""
    return Scenario(make(blocks_for(fill, requests)), requests).run(steps)


def mean_runs(scenario: Scenario, looks: int = 10, apart: int = 50) -> float:
    """`runs_per_request`, the mean of several looks at what goes on."""
    return statistics.mean(scenario.run(apart).runs_per_request() for _ in range(looks))


def runs_per_request(use: Use) -> Measured:
    """Mean number of pieces that a request lies in, when 80 % of the blocks are taken."""
    make = resolve("phase1_memory", "allocator", use).make_allocator
    scenario = settled(lambda blocks: make(blocks, kind="python"))
    return Measured(mean_runs(scenario), f"a request has {MEAN_BLOCKS:.0f} blocks on average")


def rust_speedup(use: Use) -> Measured:
    """Time of a step of the Python reference over that of the one in Rust, which is asked the same in arrays.

    Whose parts run does not matter: both allocators are the solution's. From lists to lists, as the detail says, the
    factor is smaller: Python then spends several times as long on making `Run`s as Rust on the step.
    """
    asked = settled(lambda blocks: BuddyAllocator(blocks, HEADROOM)).run(300).asked
    found = interleave(
        {
            "python": partial(replay, lambda blocks: BuddyAllocator(blocks, HEADROOM), asked),
            "lists": partial(replay, lambda blocks: RustBuddyAllocator(blocks, HEADROOM), asked),
            "arrays": partial(replay_arrays, asked),
        },
        rounds=ROUNDS,
        clock=step_clock,
    )
    python, lists, arrays = (found[name] for name in ("python", "lists", "arrays"))
    ratios = Timing(tuple(p / a for p, a in zip(python.seconds, arrays.seconds, strict=True)))
    times = f"Python {python.median * 1e6:.0f} us, Rust {arrays.median * 1e6:.1f} us"
    return Measured(
        ratios.median, f"{times}; with lists {lists.median * 1e6:.0f} us, {ratio(python, lists):.1f} x", ratios.spread
    )


def replay(make: Make, asked: Sequence[Question]) -> float:
    """Seconds of a settled step: a new allocator is asked the same questions again."""
    return _seconds(make(blocks_for(FILL)).step, asked)


def replay_arrays(asked: Sequence[Question]) -> float:
    """The same through the arrays of the allocator in Rust, which are made before the clock starts."""
    allocator = RustBuddyAllocator(blocks_for(FILL), HEADROOM)
    return _seconds(allocator.step_arrays, [(rows(release), rows(wanted)) for release, wanted in asked])


def _seconds(step: Callable[[Any, Any], object], asked: Sequence[tuple[Any, Any]]) -> float:
    for release, wanted in asked[:SETTLED]:
        step(release, wanted)
    began = time.perf_counter()
    for release, wanted in asked[SETTLED:]:
        step(release, wanted)
    return (time.perf_counter() - began) / len(asked[SETTLED:])


def step_clock(subject: Callable[[], object]) -> float:
    """For functions that time a part of what they do, and return its seconds."""
    seconds = subject()
    assert isinstance(seconds, float)
    return seconds
