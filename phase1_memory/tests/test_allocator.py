"""Allocators: what holds for any, what neighbours and headroom promise, and that Rust gives the blocks of Python.

The model is a set of blocks for each request. Which free runs a buddy allocator should have follows from the set of
free blocks alone, so it is found by brute force here.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase1_memory.allocator import BuddyAllocator
from phase1_memory.allocator_checks import Scenario, mean_runs, settled
from phase1_memory.block_tables import runs_of
from phase1_memory.runs import Run, Want
from phase1_memory.rust_allocator import RustBuddyAllocator, why_not_rust

FAR = (1 << 31) - 1, 1 << 32, (1 << 63) - 1  # numbers at the ends of 32 and 64 bits


class Both:
    """Python and Rust side by side: they must never differ."""

    def __init__(self, num_blocks, headroom):
        self.num_blocks = num_blocks
        self.python, self.rust = BuddyAllocator(num_blocks, headroom), RustBuddyAllocator(num_blocks, headroom)

    @property
    def num_free(self):
        assert self.python.num_free == self.rust.num_free
        return self.python.num_free

    def largest_free_run(self):
        assert self.python.largest_free_run() == self.rust.largest_free_run()
        return self.python.largest_free_run()

    def free_runs(self):
        return self.python.free_runs()

    def step(self, release, wanted):
        try:
            expected = self.python.step(release, wanted)
        except ValueError as error:
            with pytest.raises(ValueError) as refused:
                self.rust.step(release, wanted)
            assert str(refused.value) == str(error)
            raise
        found = self.rust.step(release, wanted)
        assert found == expected
        return found


@pytest.fixture(params=["under test", "free list", "rust", "python and rust"])
def make(request, part):
    """Makes an allocator of (number of blocks, headroom)."""
    if "rust" in request.param and (why := why_not_rust()):
        pytest.skip(why)
    framework = parts.resolve("phase1_memory", "allocator", Use.parse("phase1=framework"))
    return {
        "under test": lambda num_blocks, headroom=1: part("allocator").make_allocator(num_blocks, headroom, "python"),
        "free list": framework.BuddyAllocator,
        "rust": RustBuddyAllocator,
        "python and rust": Both,
    }[request.param]


@pytest.fixture
def make_buddies(make):
    """The same; skips where the allocator knows no neighbours, like the one that the course starts with."""
    if not knows_neighbours(make(16, 1)):
        pytest.skip("single blocks only: task 1.1")
    return make


def knows_neighbours(allocator) -> bool:
    return allocator.largest_free_run() > 1


def blocks(runs):
    return [block for start, length in runs for block in range(start, start + length)]


def buddies(free: set[int], num_blocks: int) -> list[Run]:
    """The free runs of 2^k blocks at multiples of 2^k that are no half of such a run."""

    def whole(start, size):
        return start + size <= num_blocks and free.issuperset(range(start, start + size))

    sizes = [1 << k for k in range(num_blocks.bit_length())]
    return sorted(
        Run(start, size)
        for size in sizes
        for start in range(0, num_blocks, size)
        if whole(start, size) and not whole(start - start % (2 * size), 2 * size)
    )


class Requests(RuleBasedStateMachine):
    """Requests come, grow, shrink and end in any order, and mistakes are made."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    @initialize(num_blocks=st.integers(1, 70), headroom=st.integers(1, 20))
    def begin(self, num_blocks, headroom):
        self.allocator = self.make(num_blocks, headroom)
        self.num_blocks, self.headroom = num_blocks, headroom
        self.held: list[list[int]] = []
        self.free = set(range(num_blocks))

    @rule(data=st.data())
    def step(self, data):
        release = self.drop(data)
        growing = data.draw(st.lists(st.sampled_from(self.held), unique_by=id, max_size=3)) if self.held else []
        new = [[] for _ in range(data.draw(st.integers(0, 2)))]
        wanted = [Want(data.draw(st.integers(0, 4)), mine[-1]) for mine in growing]
        wanted += [Want(data.draw(st.integers(0, 30))) for _ in new]
        self.free.update(blocks(release))
        for mine, want, runs in zip(growing + new, wanted, self.allocator.step(release, wanted), strict=True):
            self.given(want, runs)
            mine += blocks(runs or [])
        self.held += [mine for mine in new if mine]

    @rule(count=st.integers(0, 3), after=st.one_of(st.integers(-3, 80), st.sampled_from(FAR)))
    def continue_after_a_block_of_nobody_or_of_somebody_else(self, count, after):
        want = Want(count, after)
        (runs,) = self.allocator.step([], [want])
        self.given(want, runs)
        if runs:
            self.held.append(blocks(runs))

    @rule(data=st.data(), length=st.integers(-1, 3))
    def release_what_is_not_in_use(self, data, length):
        start = data.draw(st.one_of(st.sampled_from((-1, self.num_blocks, *FAR[:2])), st.integers(0, self.num_blocks)))
        held = {block for mine in self.held for block in mine}
        fine = [Run(block, 1) for block in sorted(held - set(range(start, start + length)))[:2]]
        bad = [Run(start, length)]
        if length > 0 and held.issuperset(range(start, start + length)):
            bad *= 2  # once is no mistake
        with pytest.raises(ValueError, match="released Run"):
            self.allocator.step(fine + bad, [Want(1)])

    @rule()
    def want_fewer_than_none(self):
        with pytest.raises(ValueError, match="wanted"):
            self.allocator.step([Run(mine[-1], 1) for mine in self.held[:1]], [Want(1), Want(-1)])

    @precondition(lambda self: hasattr(self, "allocator"))
    @invariant()
    def every_block_is_free_or_somebodys(self):
        held = [block for mine in self.held for block in mine]
        assert len(held) == len(set(held)) and self.free.isdisjoint(held)
        assert len(held) + len(self.free) == self.num_blocks
        assert self.allocator.num_free == len(self.free)
        if hasattr(self.allocator, "free_runs"):
            assert sorted(blocks(self.allocator.free_runs())) == sorted(self.free)

    @precondition(lambda self: hasattr(self, "allocator"))
    @invariant()
    def buddies_are_merged(self):
        if not knows_neighbours(self.make(16, 1)):
            assert self.allocator.largest_free_run() == min(1, len(self.free))
            return
        expected = buddies(self.free, self.num_blocks)
        assert self.allocator.largest_free_run() == max((run.length for run in expected), default=0)
        if hasattr(self.allocator, "free_runs"):
            assert self.allocator.free_runs() == expected

    def drop(self, data):
        """Some requests end, others lose their last blocks; as single blocks or as runs."""
        dropped = []
        for mine in data.draw(st.lists(st.sampled_from(self.held), unique_by=id, max_size=3)) if self.held else []:
            keep = data.draw(st.sampled_from((0, 0, len(mine) - 1)))
            dropped += mine[keep:]
            del mine[keep:]
        self.held = [mine for mine in self.held if mine]
        return runs_of(dropped) if data.draw(st.booleans()) else [Run(block, 1) for block in dropped]

    def given(self, want, runs):
        """What a want got, from those that were free."""
        if want.count > len(self.free):
            assert runs is None
            return
        assert runs is not None and len(blocks(runs)) == want.count
        assert self.free.issuperset(blocks(runs)), "given to two"
        if knows_neighbours(self.make(16, 1)) and want.count:
            assert all(a.start + a.length != b.start for a, b in pairwise(runs)), "neighbours are one run"
            self.began_in_the_right_place(want, runs[0].start)
        self.free.difference_update(blocks(runs))

    def began_in_the_right_place(self, want, block):
        if want.after >= 0 and want.after + 1 in self.free:
            assert block == want.after + 1
            return
        place = next(run for run in buddies(self.free, self.num_blocks) if run.start == block)
        lengths = [run.length for run in buddies(self.free, self.num_blocks)]
        room = max(want.count, self.headroom)
        assert place.length == min((length for length in lengths if length >= room), default=max(lengths))


def test_any_order_of_wants_releases_and_mistakes(make):
    run_state_machine_as_test(
        lambda: Requests(make),
        settings=settings(max_examples=100, stateful_step_count=25, deadline=None, derandomize=True),
    )


def test_a_want_is_served_whole_or_not_at_all_and_the_next_may_still_be(make):
    allocator = make(8, 1)
    first, second, third, nothing = allocator.step([], [Want(5), Want(4), Want(3), Want(0)])
    assert len(blocks(first)) == 5 and second is None and len(blocks(third)) == 3 and nothing == []
    assert allocator.num_free == 0
    assert allocator.step([], [Want(count) for count in (1, *FAR)]) == [None] * 4


def test_what_a_step_releases_serves_the_same_step(make):
    allocator = make(8, 1)
    allocator.step([], [Want(8)])
    (found,) = allocator.step([Run(2, 3), Run(7, 1)], [Want(4)])
    assert sorted(blocks(found)) == [2, 3, 4, 7]


@pytest.mark.parametrize("number", [0, -1])
def test_an_allocator_has_blocks_and_headroom(make, number):
    with pytest.raises(ValueError, match=str(number)):
        make(number, 1)
    with pytest.raises(ValueError, match=str(number)):
        make(8, number)


def test_a_prompt_lies_in_one_piece(make_buddies):
    allocator = make_buddies(1000, 64)
    for count in (1, 7, 64, 100, 33):
        (runs,) = allocator.step([], [Want(count)])
        assert len(runs) == 1


def test_requests_that_grow_together_stay_in_one_piece_while_their_headroom_lasts(make_buddies):
    allocator = make_buddies(1024, 64)
    held = [blocks(runs) for runs in allocator.step([], [Want(4)] * 8)]
    for _ in range(60):
        for mine, runs in zip(held, allocator.step([], [Want(1, mine[-1]) for mine in held]), strict=True):
            mine += blocks(runs)
    assert all(mine == list(range(mine[0], mine[0] + 64)) for mine in held)


def test_a_request_that_must_move_takes_headroom_again(make_buddies):
    allocator = make_buddies(256, 64)
    (mine,), _, _ = allocator.step([], [Want(64), Want(64), Want(1)])
    (moved,) = allocator.step([], [Want(1, mine.start + 63)])[0]
    for _ in range(63):
        (more,) = allocator.step([], [Want(1, moved.start + moved.length - 1)])[0]
        assert more.start == moved.start + moved.length
        moved = Run(moved.start, moved.length + 1)


def test_when_all_have_ended_memory_is_in_one_piece_again(make_buddies):
    scenario = Scenario(make_buddies(1024, 8), requests=20).run(200)
    held = [block for request in scenario.live for block in request.blocks]
    scenario.allocator.step(runs_of(held + scenario.freed), [])
    assert scenario.allocator.largest_free_run() == scenario.allocator.num_free == 1024


def test_a_thousand_growing_requests_lie_in_few_pieces(make_buddies):
    scenario = settled(lambda num_blocks: make_buddies(num_blocks, 64))
    assert mean_runs(scenario, looks=2) < 3


def test_a_factory_by_name_refuses_what_it_does_not_know(part):
    if part("allocator").__name__ != "phase1_memory.allocator":
        pytest.skip("the factory of the course's own allocators")
    with pytest.raises(ValueError, match="'jemalloc' is not known: choose auto, python or rust"):
        part("allocator").make_allocator(8, kind="jemalloc")
