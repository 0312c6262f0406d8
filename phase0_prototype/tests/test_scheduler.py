"""The scheduler as a state machine, and as part of the engine: whoever comes, ends or is aborted, nothing is lost."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from phase0_prototype.attention import TorchAttention
from phase0_prototype.batch import Batch
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import random_prompt

CPU = torch.device("cpu")
END = 99  # the model's end token


class Simulation:
    """Scheduler and cache with a model that writes (request, position) where keys and values go."""

    def __init__(self, part, rows=3, length=24, budget=10):
        cache = part("kv_cache")
        self.kv = cache.KVCache(cache.KVSpec(1, 1, 1, torch.float64), rows, length, CPU)
        self.scheduler = part("scheduler").Scheduler(self.kv, budget)
        self.rows, self.budget = rows, budget
        self.live: list[Request] = []
        self.count = 0

    def add(self, prompt: int, tokens: int) -> Request:
        self.count += 1
        params = SamplingParams(max_tokens=tokens)
        request = Request(str(self.count), [self.count] * prompt, params, 0, (END,), tokens)
        self.live.append(request)
        self.scheduler.add(request)
        return request

    def step(self, ends: float = 0.0, dice: random.Random | None = None) -> Batch:
        step = self.scheduler.next_step()
        assert step.scheduled, "a step without tokens"
        requests = [s.request for s in step.scheduled]
        assert len(set(map(id, requests))) == len(requests), "a request twice in one step"
        assert all(r in self.live for r in requests), "a request runs that has ended"
        for s in step.scheduled:
            assert s.start == s.request.num_computed_tokens and s.num_tokens > 0 and s.end <= s.request.num_tokens
        prompt_tokens = [s.num_tokens for s in step.scheduled if not s.request.output_token_ids]
        assert len(prompt_tokens) <= 1 or sum(prompt_tokens) <= self.budget, "more prompt tokens than the budget"
        batch = Batch.build(step, [self.kv.blocks(r) for r in requests], self.kv.block_size, CPU)
        self.write(step, batch)
        dice = dice or random.Random(0)
        tokens = [[END if dice.random() < ends else 1] if s.samples else [] for s in step.scheduled]
        ended = self.scheduler.finish(step, tokens)
        assert set(map(id, ended)) == {id(r) for r in requests if r.finish_reason is not None}
        self.live = [r for r in self.live if r.finish_reason is None]
        return batch

    def write(self, step, batch) -> None:
        if not self.kv.layer(0)[0].numel():
            return  # task 0.1: the cache that the course starts with keeps nothing
        values = [int(s.request.request_id) * 1000.0 + p for s in step.scheduled for p in range(s.start, s.end)]
        for side in self.kv.layer(0):
            side.flatten()[batch.slot_mapping] = torch.tensor(values, dtype=torch.float64)

    def check(self) -> None:
        scheduler, kv = self.scheduler, self.kv
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        assert {*map(id, running), *map(id, waiting)} == set(map(id, self.live))
        assert len(running) + len(waiting) == len(self.live)
        assert kv.num_free + len(running) == self.rows, "rows leaked"
        assert sorted(kv.blocks(r) for r in running) == [(row,) for row in range(len(running))], "rows are not dense"
        assert scheduler.has_unfinished() == bool(self.live)
        for request in running:
            (row,), computed = kv.blocks(request), request.num_computed_tokens
            expected = int(request.request_id) * 1000.0 + torch.arange(computed, dtype=torch.float64)
            for side in kv.layer(0):
                assert not computed or torch.equal(side[row, :computed].flatten(), expected), "wrong keys and values"


@pytest.fixture
def simulation(part):
    return Simulation(part)


def test_no_arrival_end_or_abort_breaks_the_invariants(part):
    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.world = Simulation(part)

        @rule(prompt=st.integers(1, 14), tokens=st.integers(1, 10))
        def add(self, prompt, tokens):
            self.world.add(prompt, tokens)

        @precondition(lambda self: self.world.live)
        @rule(seed=st.integers(0, 1000))
        def step(self, seed):
            self.world.step(0.2, random.Random(seed))

        @precondition(lambda self: self.world.live)
        @rule(data=st.data())
        def abort(self, data):
            request = data.draw(st.sampled_from(self.world.live))
            self.world.live.remove(request)
            self.world.scheduler.abort(request)
            assert request.finish_reason == "abort"
            self.world.scheduler.abort(request)  # aborting twice does nothing

        @invariant()
        def holds(self):
            self.world.check()

        def teardown(self):
            steps = sum(r.max_tokens + 1 for r in self.world.live)  # one at a time is the slowest way
            while self.world.live and steps >= 0:
                self.world.step()
                self.world.check()
                steps -= 1
            assert not self.world.live, "a request was starved"
            assert self.world.kv.num_free == self.world.rows

    health = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    options = settings(
        max_examples=50, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=health
    )
    run_state_machine_as_test(Machine, settings=options)


def test_requests_are_served_in_the_order_of_arrival(simulation):
    requests = [simulation.add(2, 3) for _ in range(7)]
    ended = []
    while simulation.live:
        before = list(simulation.live)
        simulation.step()
        ended += [r for r in before if r not in simulation.live]
    assert ended == requests
    assert [r.finish_reason for r in requests] == ["length"] * 7


def test_a_prompt_longer_than_the_budget_runs_alone_and_whole(simulation):
    simulation.add(4, 2)
    simulation.add(13, 2)
    simulation.add(4, 2)
    seen = []
    while simulation.live:
        seen += [n for n in simulation.step().query_lens if n >= 4]
        simulation.check()
    assert 13 in seen


def test_decodes_read_the_cache_as_one_slice_after_others_have_ended(part):
    """A gap is filled by another row. A step that then lists rows out of order makes attention go one by one."""
    world = Simulation(part, rows=5, budget=100)
    if not world.kv.layer(0)[0].numel():
        pytest.skip("this cache keeps nothing: task 0.1")
    for tokens in (2, 9, 4, 9, 9):
        world.add(3, tokens)
    while world.live:
        batch = world.step()
        if batch.num_tokens == batch.num_seqs:
            plan = TorchAttention().plan(batch, frozenset({None}), world.kv.block_size)
            assert plan.num_decodes == batch.num_seqs
        world.check()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_request_gets_the_same_tokens_alone_and_among_others(checkpoint, load, data):
    """Through the real model: what a sequence says depends on its own keys and values, wherever they were moved."""
    made = checkpoint("mistral-window")
    engine = load(made, max_num_seqs=3, max_model_len=64, max_num_batched_tokens=24).engine
    prompts: dict[str, list[int]] = {}
    finished = {}
    aborted = set()
    for number in range(data.draw(st.integers(2, 7))):
        prompt = random_prompt(data.draw(st.integers(1, 30)), seed=number)
        params = SamplingParams(temperature=0, max_tokens=data.draw(st.integers(1, 20)))
        prompts[engine.add_request(prompt, params)] = prompt
        for _ in range(data.draw(st.integers(0, 4))):
            if engine.has_unfinished():
                finished |= {o.request_id: o for o in engine.step() if o.finished}
        if data.draw(st.integers(0, 3)) == 0:
            victim = data.draw(st.sampled_from(sorted(set(prompts) - set(finished)) or ["none"]))
            engine.abort(victim)
            aborted.add(victim)
    while engine.has_unfinished():
        finished |= {o.request_id: o for o in engine.step() if o.finished}
    assert set(finished) == set(prompts) - aborted
    for request_id, output in finished.items():
        said, prompt = output.outputs[0].token_ids, prompts[request_id]
        best = made.logits(prompt + said)[len(prompt) - 1 : -1].argmax(-1)
        assert said == best.tolist()
    assert engine.kv.num_free == 3
