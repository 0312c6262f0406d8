"""Both allocators: invariants under random use, and the same answers block for block."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from phase1_memory.allocator import BuddyAllocator, Run, Want
from phase1_memory.rust_allocator import RustBuddyAllocator

BUILD = Path(__file__).parent.parent / "build"


def blocks(runs: list[Run]) -> list[int]:
    return [block for run in runs for block in range(run.start, run.start + run.length)]


class Machine(RuleBasedStateMachine):
    """Requests grow and end; the model is a set of block numbers for each."""

    @initialize(num_blocks=st.integers(1, 200), headroom=st.integers(1, 16))
    def make(self, num_blocks: int, headroom: int) -> None:
        self.num_blocks = num_blocks
        self.both = BuddyAllocator(num_blocks, headroom), RustBuddyAllocator(num_blocks, headroom, build=BUILD)
        self.requests: dict[int, list[int]] = {}
        self.named = 0

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        live = sorted(self.requests)
        ending = data.draw(st.lists(st.sampled_from(live), unique=True, max_size=3)) if live else []
        release = [Run(b, 1) for name in ending for b in self.requests.pop(name)]
        growing = [name for name in live if name not in ending]
        chosen = data.draw(st.lists(st.sampled_from(growing), unique=True, max_size=4)) if growing else []
        new = list(range(self.named, self.named + data.draw(st.integers(0, 2))))
        self.named += len(new)
        wanted = [Want(data.draw(st.integers(0, 3)), (self.requests[n] or [-1])[-1]) for n in chosen]
        wanted += [Want(data.draw(st.integers(0, 40))) for _ in new]
        answers = [allocator.step(release, wanted) for allocator in self.both]
        assert answers[0] == answers[1]
        free = self.num_blocks - sum(map(len, self.requests.values()))
        for name, want, runs in zip([*chosen, *new], wanted, answers[0], strict=True):
            if want.count > free:
                assert runs is None
                continue
            assert runs is not None and len(blocks(runs)) == want.count
            free -= want.count
            self.requests.setdefault(name, []).extend(blocks(runs))

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        if not hasattr(self, "both"):
            return
        used = [block for held in self.requests.values() for block in held]
        free = blocks(self.both[0].free_runs())
        assert sorted(used + free) == list(range(self.num_blocks))
        assert all(a.num_free == len(free) for a in self.both)
        assert self.both[0].largest_free_run() == self.both[1].largest_free_run()

    @invariant()
    def buddies_are_merged(self) -> None:
        if not hasattr(self, "both"):
            return
        runs = set(self.both[0].free_runs())
        for start, length in runs:
            assert start % length == 0 and length & (length - 1) == 0
            buddy = Run(start ^ length, length)
            too_large = length * 2 > 1 << (self.num_blocks.bit_length() - 1)
            assert buddy not in runs or too_large


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_random_use = Machine.TestCase


def test_a_request_that_grows_stays_in_one_piece_while_there_is_room() -> None:
    allocator = BuddyAllocator(1024, headroom=64)
    held = {name: blocks(allocator.step([], [Want(4)])[0] or []) for name in range(8)}
    for _ in range(48):
        for name, mine in held.items():
            mine += blocks(allocator.step([], [Want(1, mine[-1])])[0] or [])
    assert all(mine == list(range(mine[0], mine[0] + 52)) for mine in held.values())


@pytest.mark.parametrize("bad", [[Run(0, 1)], [Run(8, 1)], [Run(3, 2), Run(4, 1)], [Run(3, 0)]])
def test_what_is_not_in_use_is_not_released(bad: list[Run]) -> None:
    for allocator in (BuddyAllocator(8), RustBuddyAllocator(8, build=BUILD)):
        allocator.step([], [Want(8)])
        allocator.step([Run(0, 1)], [])
        with pytest.raises(ValueError, match="released"):
            allocator.step(bad, [])
        assert allocator.num_free == 1


def test_ten_thousand_steps_of_both(seed: int = 0) -> None:
    draw = random.Random(seed)
    python, rust = BuddyAllocator(5000, 8), RustBuddyAllocator(5000, 8, build=BUILD)
    held: dict[int, list[int]] = {}
    for step in range(10_000):
        ending = [name for name in list(held) if draw.random() < 0.02]
        release = [Run(b, 1) for name in ending for b in held.pop(name)]
        growing = [name for name in held if draw.random() < 1 / 16]
        wanted = [Want(1, held[name][-1]) for name in growing] + [Want(draw.randint(1, 60))]
        answer = python.step(release, wanted)
        assert answer == rust.step(release, wanted)
        for name, runs in zip([*growing, step], answer, strict=True):
            if runs is not None:
                held.setdefault(name, []).extend(blocks(runs))
    assert python.num_free == rust.num_free == 5000 - sum(map(len, held.values()))
