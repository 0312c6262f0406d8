"""What a step is made of: pieces of prompts beside tokens of those who generate, and when an idle engine begins one."""

from __future__ import annotations

import math
import random

import pytest

from phase4_scheduler.tests.scheduling import World


def decodes(world):
    """Those that have one token to compute."""
    return [r for r in world.scheduler.running if r.num_tokens - r.num_computed_tokens == 1]


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("seed", range(3))
def test_who_generates_gets_a_token_in_every_step_whatever_prompts_arrive(world, seed):
    dice = random.Random(seed)
    here = world(num_blocks=400, max_num_seqs=12, max_num_batched_tokens=16)
    for _ in range(150):
        if dice.random() < 0.4 and len(here.live) < 20:
            here.one(dice.choice([1, 5, 60, 150]), dice.randint(1, 30))
        generating = decodes(here)
        if here.live:
            done = here.step()
            assert set(generating) <= set(done.requests)
    here.run()


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("prompt", [1, 11, 12, 13, 24, 25, 100])
@pytest.mark.parametrize("busy", [0, 4])
def test_a_prompt_takes_as_many_steps_as_there_are_pieces_in_what_the_others_leave(world, prompt, busy):
    here = world(num_blocks=400, max_num_batched_tokens=12 + busy)
    for _ in range(busy):
        here.one(1, 100)
    while len(decodes(here)) < busy:
        here.step()
    request = here.one(prompt, 2)
    steps = 0
    while not request.output_token_ids:
        done = here.step()
        steps += 1
        assert done.step.num_tokens == 12 + busy or request.output_token_ids, "room is left"
    assert steps == math.ceil(prompt / 12)
    here.run()


@pytest.mark.usefixtures("continuous")
def test_a_short_prompt_fits_beside_a_long_one_that_has_a_limit(world):
    here = world(num_blocks=400, max_num_batched_tokens=16, long_prefill_token_threshold=10)
    here.one(100, 2)
    short = here.one(6, 2)
    here.step()
    assert len(short.output_token_ids) == 1
    here.run()


@pytest.mark.usefixtures("continuous")
def test_with_prefill_first_prompts_go_before_tokens_of_others(world):
    here = world(num_blocks=400, max_num_batched_tokens=16, step_priority="prefill")
    old = here.one(3, 50)
    here.step()
    new = here.one(40, 5)
    before = len(old.output_token_ids)
    for _ in range(2):
        here.step()
    assert len(old.output_token_ids) == before, "the prompt fills two steps"
    here.step()
    assert len(old.output_token_ids) == before + 1 and len(new.output_token_ids) == 1
    here.run()


@pytest.mark.parametrize("first", ["decode", "prefill"])
def test_without_pieces_a_prompt_runs_whole_and_one_that_is_too_long_runs_alone(world, first):
    here = world(num_blocks=400, enable_chunked_prefill=False, max_num_batched_tokens=16, step_priority=first)
    for prompt in (4, 50, 4, 13, 3):
        here.one(prompt, 6)
    here.run()
    prompts = [s for step in here.executor.steps for s in step.scheduled if s.start == 0]
    assert sorted(s.num_tokens for s in prompts) == [3, 4, 4, 13, 50]
    assert [len(step.scheduled) for step in here.executor.steps if step.num_tokens >= 50] == [1]


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("first", ["decode", "prefill"])
def test_no_more_run_than_can_have_a_token_in_every_step(world, first):
    """Eight places and a budget of three: a prompt that runs beside two others is not forgotten."""
    here = world(max_num_batched_tokens=3, max_num_seqs=8, step_priority=first)
    for _ in range(6):
        here.one(5, 20)
    most = 0
    while here.live:
        generating = decodes(here)
        done = here.step()
        most = max(most, len(here.scheduler.running))
        if first == "decode":
            assert set(generating) <= set(done.step.requests)
    assert most == 3


# Dynamic batching


@pytest.fixture(scope="module")
def gathers(parts):
    """For tests of an idle engine that waits for company."""
    world = World(*parts, batch_wait=5.0)
    world.one(2, 2)
    if world.loop.idle_for() == 0:
        pytest.skip("nobody is held back here: task 4.1")


@pytest.mark.usefixtures("gathers")
@pytest.mark.parametrize("ahead", [False, True])
def test_an_idle_engine_waits_until_so_many_have_come(world, ahead):
    here = world(batch_wait=5.0, batch_size=3, ahead=ahead)
    requests = []
    for _ in range(2):
        requests.append(here.one(2, 2))
        here.clock.now += 0.5
        assert not here.step().step.scheduled and not here.executor.steps
    requests.append(here.one(2, 2))
    assert here.loop.idle_for() == 0.0
    here.step()
    assert set(here.executor.steps[0].requests) == set(requests)
    here.run()


@pytest.mark.usefixtures("gathers")
def test_or_until_the_first_has_waited_so_long(world):
    here = world(batch_wait=5.0, batch_size=3)
    here.one(2, 2)
    here.clock.now += 2.0
    here.one(2, 2)
    assert here.loop.idle_for() == pytest.approx(3.0)
    here.clock.now += 2.9
    assert not here.step().step.scheduled
    here.clock.now += 0.2
    assert here.loop.idle_for() == 0.0 and len(here.step().requests) == 2
    here.run()


@pytest.mark.usefixtures("gathers")
def test_who_comes_while_others_run_is_not_held_back(world):
    here = world(batch_wait=5.0, batch_size=2)
    here.one(2, 30)
    here.one(2, 30)
    here.step()
    late = here.one(2, 2)
    here.step()
    assert late.output_token_ids
    here.run()


@pytest.mark.usefixtures("gathers")
def test_waiting_for_company_does_not_outlast_a_deadline(world):
    here = world(batch_wait=5.0)
    here.one(2, 2, deadline=here.clock.now + 1.0)
    assert here.loop.idle_for() == pytest.approx(1.0)
    here.clock.now += 1.0
    assert here.loop.idle_for() == 0.0 and len(here.step().step.rejected) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_idle_for_tells_the_truth(world, ahead):
    """A number: a step would compute nothing. 0: it computes or tells something. None: nobody is there."""
    dice = random.Random(1)
    here = world(batch_wait=3.0, batch_size=3, ahead=ahead, max_num_seqs=3)
    for _ in range(400):
        if dice.random() < 0.2:
            here.one(dice.randint(1, 4), dice.randint(1, 4), deadline=here.clock.now + dice.uniform(0.5, 9))
        if here.live and dice.random() < 0.1:
            here.abort(dice.choice(here.live))
        idle, launched, told = here.loop.idle_for(), len(here.executor.steps), len(here.told)
        assert (idle is None) == (not here.loop.has_unfinished())
        if idle is None:
            here.clock.now += 0.3
            continue
        on_its_way = len(here.executor.on_its_way)
        done = here.step()
        did = len(here.executor.steps) > launched or len(here.told) > told or on_its_way
        assert bool(did) == (idle == 0.0), (idle, done)
        here.clock.now += dice.choice([0.0, 0.1, idle])
