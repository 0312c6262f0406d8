"""The scheduler as a state machine with too little memory: whoever comes, ends, is aborted, swapped or forgotten,
nothing is lost, and everybody ends.

The model of a model writes (sequence, position) where keys and values go, so that a block that is read by the wrong
sequence, or comes back from the store as another one, is seen. What a policy promises beyond being right has tests of
its own.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phase0_prototype.batch import Batch
from phase0_prototype.kv_spec import KVSpec
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams

CPU = torch.device("cpu")
END = 99  # the model's end token
SPEC = KVSpec(num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float64)
REJECTED = "out of KV blocks"


class Shelf:
    """A store in a dict that may be full, slow and forgetful.

    Args:
        full, slow, forgetful: how likely it refuses to save, is not ready, and has lost what it is asked for.
    """

    def __init__(self, seed=0, *, full=0.0, slow=0.0, forgetful=0.0):
        self.full, self.slow, self.forgetful = full, slow, forgetful
        self.dice = random.Random(seed)
        self.entries: dict[str, torch.Tensor] = {}
        self.saved, self.prefetched = Counter(), Counter()

    def save(self, key, blocks):
        assert key not in self.entries, "saved twice"
        assert blocks.dtype == torch.uint8 and blocks.dim() == 2 and blocks.is_contiguous()
        if self.dice.random() < self.full:
            return False
        self.entries[key] = blocks.clone()
        self.saved[key] += 1
        return True

    def prefetch(self, key):
        assert key in self.entries
        self.prefetched[key] += 1

    def ready(self, key):
        assert key in self.entries
        return self.dice.random() >= self.slow

    def load(self, key):
        blocks = self.entries.pop(key)
        return None if self.dice.random() < self.forgetful else blocks

    def drop(self, key):
        self.entries.pop(key, None)


class Simulation:
    """Scheduler, block tables and cache of the implementation under test, with a model that marks what it writes."""

    def __init__(self, part, make_cache, num_blocks=8, page=4, *, budget=10, seqs=4, store=None, **policy):
        self.kv = make_cache(num_blocks, page, SPEC)
        self.scheduler = part("scheduler").Scheduler(self.kv, budget, seqs, store=store, **policy)
        self.num_blocks, self.page, self.budget, self.seqs, self.store = num_blocks, page, budget, seqs, store
        self.live: list[Request] = []  # oldest first
        self.rejected: list[Request] = []
        self.untold: list[Request] = []  # rejected in a step that failed: named again in the next
        self.groups = self.count = self.computed_tokens = 0
        self.failed: set[str] = set()  # sequences of steps that were planned and not finished

    def add(self, prompt: int, tokens: int, n: int = 1) -> list[Request]:
        self.groups += 1
        params = SamplingParams(max_tokens=tokens, n=n)
        made = []
        for index in range(n):
            self.count += 1
            prompt_ids = [self.groups] * prompt
            made.append(Request(str(self.count), prompt_ids, params, 0, (END,), tokens, index, f"g{self.groups}"))
            self.live.append(made[-1])
            self.scheduler.add(made[-1])
        return made

    def holders(self) -> dict[str, list[int]]:
        return {name: table for name, table in self.kv.tables.tables.items() if table}

    def plan(self):
        """The next step, and what must be true of it."""
        held = [r for r in self.live if r.request_id in self.holders()]
        step = self.scheduler.next_step()
        self.reject(step.rejected)
        holders = self.holders()
        taken = [r for r in held if r in self.live and r.request_id not in holders]
        assert not taken or taken[0] is not held[0], "the oldest lost its memory"
        assert step.scheduled, "a step without tokens"
        requests = step.requests
        assert len(set(map(id, requests))) == len(requests) <= self.seqs
        assert all(r in self.live for r in requests), "a request runs that has ended"
        for s in step.scheduled:
            assert s.start == s.request.num_computed_tokens and s.num_tokens > 0 and s.end <= s.request.num_tokens
            assert len(holders[s.request.request_id]) * self.page >= s.end, "runs without room for its tokens"
            for fork in s.forks:
                assert fork.prompt_token_ids == s.request.prompt_token_ids and fork.group == s.request.group
                assert not fork.output_token_ids and not s.request.output_token_ids and s.samples
        prompts = [s.num_tokens for s in step.scheduled if not s.start]
        if len(prompts) == len(step.scheduled) and not self.failed & {r.request_id for r in requests}:
            assert len(prompts) == 1 or sum(prompts) <= self.budget, "more prompt tokens than the budget"
        return step

    def fail(self):
        """Plan a step that is never finished: the forward pass raises (no memory, Ctrl-C)."""
        step = self.plan()
        self.failed |= {r.request_id for r in step.requests}
        self.untold = list(step.rejected)
        return step

    def reject(self, requests):
        assert requests[: len(self.untold)] == tuple(self.untold), "who was rejected in a failed step is forgotten"
        for request in requests[len(self.untold) :]:
            assert request in self.live and request.request_id not in self.holders()
            assert (request.finish_reason, request.stop_reason) == ("abort", REJECTED)
            self.live.remove(request)
            self.rejected.append(request)

    def step(self, ends=0.0, dice=None):
        """Plan, compute and finish one step."""
        step = self.plan()
        batch = Batch.build(step, [self.kv.blocks(s.request) for s in step.scheduled], self.page, CPU)
        self.write(step, batch)
        dice = dice or random.Random(0)
        samples = {id(r) for s in step.scheduled if s.samples for r in (s.request, *s.forks)}
        tokens = [[END if dice.random() < ends else 1] if id(r) in samples else [] for r in step.requests]
        ended = self.scheduler.finish(step, tokens)
        self.untold = []
        assert set(map(id, ended)) == {id(r) for r in step.requests if r.finish_reason is not None}
        self.live = [r for r in self.live if r.finish_reason is None]
        self.computed_tokens += step.num_tokens
        return step

    def mark(self, request, position) -> float:
        prompt = position < len(request.prompt_token_ids)
        return (request.prompt_token_ids[0] if prompt else 1000 + int(request.request_id)) * 1000.0 + position

    def write(self, step, batch) -> None:
        holders = Counter(block for table in self.holders().values() for block in table)
        written = (batch.slot_mapping // self.page).tolist()
        assert all(holders[block] == 1 for block in written), "writes into a block that others read"
        marks = [self.mark(s.request, p) for s in step.scheduled for p in range(s.start, s.end)]
        for side in self.kv.layer(0):
            side.flatten()[batch.slot_mapping] = torch.tensor(marks, dtype=torch.float64)

    def check(self) -> None:
        holders = self.holders()
        by_name = {r.request_id: r for r in self.live}
        assert set(holders) <= set(by_name), "memory of a request that has ended"
        assert self.kv.num_free + len({b for table in holders.values() for b in table}) == self.num_blocks, "leak"
        assert self.scheduler.has_unfinished() == bool(self.live or self.untold)
        for name, table in holders.items():
            request = by_name[name]
            expected = torch.tensor([self.mark(request, p) for p in range(request.num_computed_tokens)]).double()
            for side in self.kv.layer(0):
                assert torch.equal(side[table].flatten()[: len(expected)], expected), f"wrong keys and values of {name}"
        if self.store is not None:
            assert set(self.store.entries) <= set(by_name) - set(holders), "the store keeps what nobody needs"
        self.spoil_free_blocks()

    def spoil_free_blocks(self) -> None:
        """A sequence that comes back into its old blocks must not find there what it forgot to take along."""
        held = {block for table in self.holders().values() for block in table}
        for side in self.kv.layer(0):
            side[[block for block in range(self.num_blocks) if block not in held]] = -1.0

    def abort(self, request) -> None:
        self.live.remove(request)
        self.scheduler.abort(request)
        assert request.finish_reason == "abort"
        self.scheduler.abort(request)  # aborting twice does nothing

    def run(self, most=None) -> int:
        """To the end; returns the steps."""
        most = sum(r.max_tokens + 1 for r in self.live) if most is None else most  # one at a time is the slowest way
        steps = 0
        while self.live:
            assert steps < most, "a request was starved"
            self.step()
            self.check()
            steps += 1
        assert self.kv.num_free == self.num_blocks
        assert self.store is None or not self.store.entries
        return steps


@pytest.fixture
def simulate(part, make_cache):
    return lambda *args, **settings: Simulation(part, make_cache, *args, **settings)


def machine(part, make_cache, pressure):
    class Machine(RuleBasedStateMachine):
        @initialize(
            num_blocks=st.integers(5, 14),
            seqs=st.integers(1, 6),
            watermark=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
            faults=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3),
        )
        def make(self, num_blocks, seqs, watermark, faults):
            full, slow, forgetful = faults
            store = Shelf(full=full, slow=slow, forgetful=forgetful) if pressure == "swap" else None
            self.world = Simulation(
                part, make_cache, num_blocks, 3, seqs=seqs, watermark=watermark, pressure=pressure, store=store
            )

        @rule(prompt=st.integers(1, 9), tokens=st.integers(1, 7), n=st.sampled_from([1, 1, 2, 3, 5]))
        def add(self, prompt, tokens, n):
            """At most 15 tokens in the cache: each alone fits."""
            self.world.add(prompt, tokens, n)

        @precondition(lambda self: self.world.live)
        @rule(seed=st.integers(0, 1000), count=st.integers(1, 3))
        def steps(self, seed, count):
            for i in range(count):
                if self.world.live:
                    self.world.step(0.1, random.Random(seed + i))
                    self.world.check()

        @precondition(lambda self: self.world.live)
        @rule()
        def fail(self):
            self.world.fail()

        @precondition(lambda self: self.world.live)
        @rule(data=st.data())
        def abort(self, data):
            self.world.abort(data.draw(st.sampled_from(self.world.live)))

        @invariant()
        def holds(self):
            if hasattr(self, "world"):
                self.world.check()

        def teardown(self):
            if hasattr(self, "world"):
                self.world.run()

    return Machine


@pytest.mark.parametrize("pressure", ["recompute", "swap", "reject"])
def test_no_arrival_end_abort_or_loss_breaks_the_invariants(part, make_cache, pressure):
    health = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    options = settings(
        max_examples=150,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=health,
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine(part, make_cache, pressure), settings=options)


def test_requests_that_fit_are_served_in_the_order_of_arrival(simulate):
    world = simulate(num_blocks=8, seqs=2)
    requests = [world.add(2, 3)[0] for _ in range(7)]
    ended = []
    while world.live:
        before = list(world.live)
        world.step()
        ended += [r for r in before if r not in world.live]
    assert ended == requests
    assert [r.finish_reason for r in requests] == ["length"] * 7


def test_a_prompt_longer_than_the_budget_runs_alone_and_whole(simulate):
    world = simulate(num_blocks=12)
    for prompt in (4, 13, 4):
        world.add(prompt, 2)
    seen = []
    while world.live:
        seen.append([s.num_tokens for s in world.step().scheduled])
        world.check()
    assert [13] in seen


def test_a_sequence_may_use_all_the_memory(simulate):
    world = simulate(num_blocks=5, page=4, watermark=0.5)
    (request,) = world.add(13, 7)
    world.run()
    assert len(request.output_token_ids) == 7


# Memory is taken for what is there


@pytest.mark.usefixtures("on_demand")
def test_sequences_are_admitted_by_the_tokens_that_they_have(simulate):
    """Eight prompts of a block each, though their answers could be as long as the memory."""
    world = simulate(num_blocks=10, seqs=8, budget=100, watermark=0)
    for _ in range(8):
        world.add(4, 30)
    assert len(world.step().scheduled) == 8
    assert world.kv.num_free == 2


@pytest.mark.usefixtures("on_demand")
def test_who_ends_makes_room_in_the_next_step(simulate):
    world = simulate(num_blocks=4, page=4, budget=100, watermark=0)
    world.add(8, 1)
    world.add(8, 2)
    (third,) = world.add(5, 2)
    assert len(world.step().scheduled) == 2
    assert world.step().requests == (third,)


@pytest.mark.usefixtures("on_demand")
@pytest.mark.parametrize("watermark", [0.0, 0.01, 0.2, 0.5])
def test_admission_leaves_the_watermark_to_those_who_run(simulate, watermark):
    world = simulate(num_blocks=20, seqs=20, budget=1000, watermark=watermark)
    for _ in range(20):
        world.add(4, 3)
    world.step()
    assert world.kv.num_free == math.ceil(watermark * 20)


@pytest.mark.usefixtures("on_demand")
def test_the_watermark_holds_for_those_who_come_back_too(simulate):
    store = Shelf()
    world = simulate(num_blocks=10, page=2, watermark=0.2, budget=100, pressure="swap", store=store, seqs=3)
    for tokens in (5, 14, 14):
        world.add(4, tokens)
    returned = 0
    while world.live:
        away = {r.request_id: world.kv.tables.pages(r.num_tokens) for r in world.live if r.request_id in store.entries}
        free, busy = world.kv.num_free, len(world.holders()) > 0
        world.step()
        back = [need for name, need in away.items() if name not in store.entries]
        returned += len(back)
        assert not back or not busy or sum(back) + 2 <= free
    assert returned


# Groups


def tokens_run(world) -> int:
    world.run()
    return world.computed_tokens


@pytest.mark.usefixtures("prompts_once")
def test_the_prompt_of_a_group_is_computed_once(simulate):
    world = simulate(num_blocks=20, budget=100)
    world.add(9, 5, n=4)
    assert tokens_run(world) == 9 + 4 * 4, "the last token of an answer is never computed"


@pytest.mark.usefixtures("prompts_once")
def test_groups_that_follow_one_another_do_not_mix(simulate):
    world = simulate(num_blocks=40, budget=100, seqs=10)
    world.add(9, 2, n=3)
    world.add(9, 2, n=3)
    step = world.step()
    assert [len(s.forks) for s in step.scheduled] == [2, 2]
    world.run()


def test_a_group_without_a_name_shares_with_nobody(simulate):
    """`group` is "" for requests that nobody has grouped: equal names must not make them one."""
    world = simulate(num_blocks=20, budget=100)
    for prompt in (3, 4):
        params = SamplingParams(max_tokens=2)
        request = Request(f"{1000 + prompt}", [prompt] * prompt, params, 0, (), 2)
        world.live.append(request)
        world.scheduler.add(request)
    assert [s.num_tokens for s in world.step().scheduled] == [3, 4]
    world.run()


@pytest.mark.usefixtures("prompts_once")
def test_a_group_that_is_larger_than_the_batch_comes_in_parts(simulate):
    world = simulate(num_blocks=20, seqs=3, budget=100)
    world.add(6, 4, n=8)
    assert len(world.step().requests) == 3
    world.run()
    assert world.computed_tokens == 3 * 6 + 8 * 3, "the prompt once for each part"


def test_the_leader_of_a_waiting_group_can_be_aborted(simulate):
    world = simulate(num_blocks=20, budget=100)
    leader, *others = world.add(6, 3, n=3)
    world.abort(leader)
    world.check()
    assert set(world.step().requests) == set(others)
    world.run()


@pytest.mark.usefixtures("prompts_once")
def test_a_group_shares_its_full_blocks_until_the_end(simulate):
    world = simulate(num_blocks=20, page=4, budget=100)
    world.add(8, 4, n=4)
    world.step()
    assert world.kv.num_free == 18
    world.step()
    assert world.kv.num_free == 18 - 4, "each writes into a block of its own"
    assert world.kv.copied_blocks == 0
    world.run()


# When blocks run out


def crowd(world, count=4):
    """As many as are admitted at once, each of which grows to a third of the memory and more."""
    return [world.add(3, 9)[0] for _ in range(count)]


@pytest.mark.usefixtures("on_demand")
@pytest.mark.parametrize("pressure", ["recompute", "swap", "reject"])
def test_the_youngest_goes_first(simulate, pressure):
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, pressure=pressure, store=Shelf())
    requests = crowd(world)
    gone = []
    while world.live:
        world.step()
        gone += [
            r for r in requests if r not in gone and r.finish_reason is None and r.request_id not in world.holders()
        ]
        gone += [r for r in world.rejected if r not in gone]
        world.check()
    assert gone and gone == requests[-1 : -1 - len(gone) : -1]


@pytest.mark.usefixtures("on_demand")
def test_the_youngest_goes_even_if_it_came_back_before_its_elders(simulate):
    """A store with little room: the last one is swapped and comes back at once, the one before computes again."""
    outlived = 0
    for seed in range(20):
        store = Shelf(seed, full=0.5, slow=0.3)
        world = simulate(num_blocks=9, page=3, budget=100, watermark=0, seqs=6, pressure="swap", store=store)
        for tokens in (9, 12, 12, 5, 12, 9):
            world.add(3, tokens)
        while world.live:
            held = [r for r in world.live if r.request_id in world.holders()]
            order = {id(r): age for age, r in enumerate(world.live)}
            world.plan()
            kept = [order[id(r)] for r in world.live if r.request_id in world.holders()]
            gone = [order[id(r)] for r in held if r.request_id not in world.holders()]
            assert not gone or max(kept) < min(gone)
            outlived += bool(gone)
            world.step()  # the same plan again, computed this time
            world.check()
    assert outlived > 20


@pytest.mark.usefixtures("on_demand")
def test_recompute_forgets_and_computes_again(simulate):
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0)
    requests = crowd(world)
    world.run()
    assert all(len(r.output_token_ids) == 9 for r in requests)
    assert world.scheduler.preemptions > 0
    assert world.computed_tokens == 4 * (3 + 8) + world.scheduler.recomputed_tokens


@pytest.mark.usefixtures("on_demand")
def test_swapped_sequences_come_back_with_everything_they_had(simulate):
    store = Shelf()
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, pressure="swap", store=store)
    requests = crowd(world)
    world.run()
    assert all(len(r.output_token_ids) == 9 for r in requests)
    assert store.saved.total() == world.scheduler.preemptions > 0
    assert world.scheduler.recomputed_tokens == 0
    assert world.computed_tokens == 4 * (3 + 8), "nothing is computed twice"
    assert set(store.prefetched) == set(store.saved), "each was announced before it was loaded"


@pytest.mark.usefixtures("on_demand")
@pytest.mark.parametrize("fault", ["full", "forgetful"])
def test_a_store_that_keeps_nothing_costs_a_recomputation_and_nothing_else(simulate, fault):
    store = Shelf(**{fault: 1.0})
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, pressure="swap", store=store)
    requests = crowd(world)
    world.run()
    assert all(len(r.output_token_ids) == 9 for r in requests)
    assert world.scheduler.recomputed_tokens > 0
    assert world.computed_tokens == 4 * (3 + 8) + world.scheduler.recomputed_tokens


@pytest.mark.usefixtures("on_demand")
def test_sequences_that_the_store_has_lost_keep_their_order(simulate):
    store = Shelf(forgetful=1.0)
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, pressure="swap", store=store)
    oldest, *others = crowd(world)
    while len(store.entries) < 3:
        world.step()
    world.abort(oldest)  # now nobody runs, and all that comes back is lost
    assert list(world.step().requests) == others[: len(world.holders())]
    world.run()


@pytest.mark.usefixtures("on_demand")
def test_others_run_while_a_sequence_is_on_its_way_back(simulate):
    store = Shelf(slow=1.0)
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, pressure="swap", store=store)
    requests = crowd(world)
    world.run()
    assert all(r.finish_reason == "length" for r in requests)
    assert store.saved.total() > 0
    assert store.prefetched.total() > store.saved.total(), "it was asked for again and again"


@pytest.mark.usefixtures("on_demand")
def test_a_swapped_sequence_can_be_aborted(simulate):
    store = Shelf()
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, pressure="swap", store=store)
    requests = crowd(world)
    while not store.entries:
        world.step()
    away = [r for r in requests if r.request_id in store.entries]
    for request in away:
        world.abort(request)
    assert not store.entries
    world.run()


@pytest.mark.usefixtures("on_demand")
def test_rejected_sequences_end_and_the_others_go_on(simulate):
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, pressure="reject")
    requests = crowd(world)
    world.run()
    assert world.rejected and world.scheduler.preemptions == 0
    assert world.computed_tokens <= 4 * (3 + 8)
    kept = [r for r in requests if r not in world.rejected]
    assert requests[0] in kept
    assert all(len(r.output_token_ids) == 9 and r.stop_reason is None for r in kept)


@pytest.mark.usefixtures("on_demand")
@pytest.mark.parametrize("pressure", ["recompute", "swap"])
def test_a_preempted_sequence_goes_before_those_who_have_not_begun(simulate, pressure):
    world = simulate(num_blocks=6, page=3, budget=100, watermark=0, seqs=3, pressure=pressure, store=Shelf())
    first = crowd(world, 3)
    (late,) = world.add(3, 2)
    while late.request_id not in world.holders():
        world.step()
    assert world.scheduler.preemptions
    assert all(r.finish_reason or r.request_id in world.holders() for r in first)
    world.run()


@pytest.mark.parametrize("pressure", ["recompute", "swap", "reject"])
def test_a_group_whose_prompt_failed_is_planned_again(simulate, pressure):
    """The forks have no blocks yet, and are taken for sequences that do."""
    world = simulate(num_blocks=4, page=3, budget=100, watermark=0, pressure=pressure, store=Shelf())
    world.add(8, 3, n=4)
    world.fail()
    world.run(most=100)


@pytest.mark.usefixtures("on_demand")
def test_prompts_of_a_step_that_failed_are_planned_again_within_the_budget(simulate):
    """Where a prompt was too much for the memory, trying again with more of them is no remedy."""
    world = simulate(num_blocks=20, budget=10, seqs=8)
    for _ in range(4):
        world.add(8, 2)
        world.fail()
    while world.live:
        assert sum(s.num_tokens for s in world.step().scheduled if not s.start) <= 10
