"""Block tables as a state machine: whatever is written, forked, refused and released, every sequence reads its own.

The model is a list of values for each sequence, and physical memory as lists of places that nothing but the tables and
the copies that they ask for connects to it. What only an implementation that shares blocks can do has tests of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phase1_memory.allocator import BuddyAllocator
from phase1_memory.runs import Write


class World:
    """Block tables, the memory that they speak about, and what each sequence has written.

    Args:
        tables: under test.
        sharing: hold them to sharing blocks with the fewest copies that are possible.
    """

    def __init__(self, tables, *, sharing=False):
        self.tables, self.sharing = tables, sharing
        self.memory = [[None] * tables.page for _ in range(tables.num_blocks)]
        self.said: dict[str, list[int]] = {}
        self.counter = itertools.count(1)

    def blocks(self, name):
        return list(self.tables.tables.get(name, ()))

    def holders(self):
        return Counter(block for table in self.tables.tables.values() for block in table)

    def needs(self, writes):
        """Blocks that these writes take: new ones, and copies, at least and if everyone who writes gets one."""
        holders, writers, new = self.holders(), Counter(), 0
        for write in writes:
            table = self.blocks(write.name)
            pages = -(-write.end // self.tables.page)
            new += max(0, pages - len(table))
            writers.update(table[write.start // self.tables.page : pages])
        least = sum(min(count, holders[block] - 1) for block, count in writers.items())
        most = sum(count for block, count in writers.items() if holders[block] > 1)
        return new + least, new + most

    def write(self, spans):
        """{sequence: (start, end)}; returns the copies, None where there was no room."""
        writes = [Write(name, start, end) for name, (start, end) in spans.items()]
        least, most = self.needs(writes)
        before, free = self.snapshot(), self.tables.num_free
        copies = self.tables.reserve(writes)
        if copies is None:
            assert most > free, "refused although there was room"
            assert not self.sharing or least > free, "refused although there was room for those who need a copy"
            assert self.snapshot() == before, "a refused step changed something"
            return None
        assert least <= free, "granted more than was free"
        assert not self.sharing or self.tables.num_free == free - least, "took more blocks than needed"
        self.copy(copies)
        holders = self.holders()
        for write in writes:
            said = self.said.setdefault(write.name, [])
            said += [0] * (write.end - len(said))
            for token in range(write.start, write.end):
                block, place = self.place(write.name, token)
                assert holders[block] == 1, f"{write.name} writes into block {block}, which others read"
                said[token] = self.memory[block][place] = next(self.counter)
        return copies

    def copy(self, copies):
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        assert not {source for source, _ in copies} & set(targets), "a copy reads what another has overwritten"
        for source, target in copies:
            self.memory[target] = list(self.memory[source])

    def fork(self, parent, child):
        free, said = self.tables.num_free, self.said[parent]
        got = self.tables.fork(parent, child, len(said))
        assert 0 <= got <= len(said)
        self.said[child] = said[:got]
        if self.sharing:
            assert got == len(said)
            assert self.tables.num_free == free, "a fork took blocks"
        return got

    def release(self, name):
        self.tables.release(name)
        del self.said[name]
        holders = self.holders()
        for block in range(self.tables.num_blocks):
            if not holders[block]:  # whoever gets it must not find there by chance what should have been copied
                self.memory[block] = [None] * self.tables.page

    def place(self, name, token):
        page = self.tables.page
        return self.blocks(name)[token // page], token % page

    def read(self, name):
        return [
            self.memory[block][place] for block, place in (self.place(name, t) for t in range(len(self.said[name])))
        ]

    def snapshot(self):
        tables = self.tables
        return {name: list(t) for name, t in tables.tables.items()}, list(tables.references), tables.num_free

    def check(self):
        tables, holders = self.tables, self.holders()
        for name, said in self.said.items():
            assert self.read(name) == said, f"{name} does not read what it wrote"
            assert len(self.blocks(name)) == tables.pages(len(said)), f"{name} holds blocks that it has no tokens in"
            assert len(set(self.blocks(name))) == len(self.blocks(name)), f"{name} has a block twice"
        assert {name for name, table in tables.tables.items() if table} <= set(self.said), "a table that is nobody's"
        assert all(0 <= block < tables.num_blocks for block in holders)
        assert list(tables.references) == [holders[block] for block in range(tables.num_blocks)]
        assert tables.num_free + len(holders) == tables.num_blocks, "blocks leaked"
        assert tables.shared_blocks() == sum(count > 1 for count in holders.values())


def machine(make_tables, *, sharing):
    class Machine(RuleBasedStateMachine):
        @initialize(num_blocks=st.integers(1, 14), page=st.sampled_from([1, 2, 3, 4, 16]))
        def make(self, num_blocks, page):
            self.world = World(make_tables(num_blocks, page), sharing=sharing)
            self.named = itertools.count()

        def new_name(self):
            return f"s{next(self.named)}"

        @rule(data=st.data())
        def write(self, data):
            """One step: some sequences go on, some begin, some write again what they have said before."""
            said, page = self.world.said, self.world.tables.page
            chosen = data.draw(st.lists(st.sampled_from(sorted(said)), unique=True, max_size=5)) if said else []
            spans = {}
            for name in [*chosen, *(self.new_name() for _ in range(data.draw(st.integers(0, 2))))]:
                length = len(said.get(name, ()))
                start = length if data.draw(st.integers(0, 3)) else data.draw(st.integers(0, length))
                spans[name] = start, max(length, start + data.draw(st.integers(1, 2 * page + 1)))
            self.world.write(spans)

        @precondition(lambda self: self.world.said)
        @rule(data=st.data())
        def fork(self, data):
            self.world.fork(data.draw(st.sampled_from(sorted(self.world.said))), self.new_name())

        @precondition(lambda self: self.world.said)
        @rule(data=st.data())
        def release(self, data):
            self.world.release(data.draw(st.sampled_from(sorted(self.world.said))))

        @rule()
        def release_nobody(self):
            self.world.tables.release("unknown")

        @invariant()
        def holds(self):
            if hasattr(self, "world"):
                self.world.check()

        def teardown(self):
            if not hasattr(self, "world"):
                return
            world = self.world
            for name in list(world.said):
                world.release(name)
                world.check()
            everything = world.tables.num_blocks * world.tables.page
            assert world.write({"all": (0, everything)}) == [], "what was released can't be had again"
            world.check()
            assert world.write({"more": (0, 1)}) is None

    return Machine


OPTIONS = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def test_whatever_happens_every_sequence_reads_what_it_wrote(make_tables):
    run_state_machine_as_test(machine(make_tables, sharing=False), settings=OPTIONS)


def test_a_step_that_does_not_fit_changes_nothing(make_tables):
    world = World(make_tables(4, 4))
    assert world.write({"a": (0, 6), "b": (0, 3)}) == []
    before = world.snapshot()
    assert world.write({"a": (6, 9), "b": (3, 5), "new": (0, 1)}) is None
    assert world.snapshot() == before
    assert "new" not in world.tables.tables
    assert world.write({"b": (3, 5)}) == []
    world.check()


def test_a_block_is_taken_when_the_tokens_reach_it_and_not_before(make_tables):
    world = World(make_tables(8, 4))
    taken = []
    for token in range(9):
        world.write({"a": (token, token + 1)})
        taken.append(8 - world.tables.num_free)
    assert taken == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_names_that_hold_nothing_can_be_released(make_tables):
    tables = make_tables(3, 4)
    tables.release("never seen")
    assert tables.num_free == 3
    tables.reserve([Write("a", 0, 1)])
    tables.release("a")
    tables.release("a")
    assert tables.num_free == 3


# Sharing: what a fork costs


@pytest.fixture
def world(make_tables, sharing):
    return World(make_tables(12, 4), sharing=True)


def test_blocks_are_shared_in_any_order_of_events_with_the_fewest_copies(make_tables, sharing):
    run_state_machine_as_test(machine(make_tables, sharing=True), settings=OPTIONS)


def test_forks_take_no_block_until_one_writes(world):
    world.write({"a": (0, 10)})
    for child in "bcd":
        world.fork("a", child)
    assert world.tables.num_free == 12 - 3
    assert world.tables.shared_blocks() == 3
    assert world.write({"b": (10, 11)}) == [(world.blocks("a")[2], world.blocks("b")[2])]
    assert world.tables.num_free == 12 - 4
    assert world.blocks("b")[:2] == world.blocks("a")[:2], "full blocks stay shared"
    world.check()


def test_two_forks_that_write_in_one_step_cost_one_copy(world):
    world.write({"a": (0, 6)})
    world.fork("a", "b")
    assert len(world.write({"a": (6, 7), "b": (6, 7)})) == 1
    assert world.tables.num_free == 12 - 3
    world.check()


def test_of_three_that_share_and_two_that_write_both_get_a_copy(world):
    world.write({"a": (0, 6)})
    world.fork("a", "b")
    world.fork("a", "c")
    assert len(world.write({"a": (6, 7), "c": (6, 7)})) == 2
    world.check()


def test_the_last_one_who_holds_a_block_writes_without_a_copy(world):
    world.write({"a": (0, 6)})
    world.fork("a", "b")
    world.release("a")
    before = world.blocks("b")
    assert world.write({"b": (6, 8)}) == []
    assert world.blocks("b") == before
    world.check()


def test_forks_of_a_full_block_copy_nothing(world):
    world.write({"a": (0, 8)})
    world.fork("a", "b")
    world.fork("b", "c")
    assert world.write({"a": (8, 9), "b": (8, 9), "c": (8, 9)}) == []
    assert world.tables.num_free == 12 - 2 - 3
    world.check()


def test_a_child_keeps_the_blocks_of_a_parent_that_has_ended(world):
    world.write({"a": (0, 10)})
    world.fork("a", "b")
    world.release("a")
    assert world.tables.num_free == 12 - 3
    assert world.write({"other": (0, 36)}) == []
    assert world.write({"more": (0, 1)}) is None
    world.check()


def test_a_refused_copy_leaves_the_blocks_shared(world):
    world.write({"a": (0, 6)})
    world.fork("a", "b")
    world.write({"other": (0, 40)})
    before = world.snapshot()
    assert world.write({"a": (6, 7), "b": (6, 7)}) is None
    assert world.snapshot() == before
    world.release("other")
    assert len(world.write({"a": (6, 7), "b": (6, 7)})) == 1
    world.check()


def test_blocks_that_were_just_freed_can_be_the_copies(world):
    """The source of a copy is never among what the same step hands out."""
    world.write({"a": (0, 6), "b": (0, 40)})
    world.fork("a", "c")
    world.release("b")
    for start in range(6, 14):
        world.write({"a": (start, start + 1), "c": (start, start + 1)})
        world.check()


# The allocator's side


class Counting(BuddyAllocator):
    """Counts how often it is asked."""

    calls = 0

    def step(self, release, wanted):
        self.calls += 1
        return super().step(release, wanted)


def test_a_step_of_many_sequences_asks_the_allocator_once(part, sharing):
    allocator = Counting(64)
    world = World(part("block_tables").BlockTables(allocator, 4), sharing=True)
    world.write({f"s{i}": (0, 6) for i in range(8)})
    assert allocator.calls == 1
    for i in range(8):
        world.fork(f"s{i}", f"fork{i}")
    for i in range(4):
        world.release(f"s{i}")
    assert allocator.calls == 1, "what is freed goes back with the next step"
    world.write({name: (6, 9) for name in world.said})
    assert allocator.calls == 2
    world.write({name: (9, 10) for name in world.said})
    assert allocator.calls == 2, "nobody needed a block"
    world.check()


def test_a_sequence_that_grows_continues_where_it_is(part):
    """With the neighbour free, the next block is the neighbour: a sequence alone is one run."""
    tables = part("block_tables").BlockTables(BuddyAllocator(32), 4)
    for end in range(1, 65):
        tables.reserve([Write("a", end - 1, end)])
    first = tables.tables["a"][0]
    assert tables.tables["a"] == list(range(first, first + 16))


BLOCKS = st.lists(st.integers(0, 60), unique=True)


@settings(deadline=None, derandomize=True)
@given(BLOCKS)
def test_runs_are_the_same_blocks_in_ascending_order(part, blocks):
    runs = part("block_tables").runs_of(blocks)
    assert [block for run in runs for block in range(run.start, run.start + run.length)] == sorted(blocks)
    assert all(run.length > 0 for run in runs)


@pytest.mark.usefixtures("sharing")
@settings(deadline=None, derandomize=True)
@given(BLOCKS)
def test_neighbours_are_one_run(part, blocks):
    runs = part("block_tables").runs_of(blocks)
    assert all(a.start + a.length < b.start for a, b in itertools.pairwise(runs))
