"""When blocks run out: who gives way, what it costs, and that there is progress all the same."""

from __future__ import annotations

import math
import random

import pytest

from phase4_scheduler.scheduler_config import POLICIES

PRESSURES = ("recompute", "swap", "reject")


def crowd(world, count=4, **settings):
    """As many as are admitted at once, each of which grows to a third of the memory and more."""
    here = world(num_blocks=6, page=3, **settings)
    return here, [here.one(3, 10) for _ in range(count)]


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("watermark", [0.0, 0.01, 0.2, 0.5])
def test_admission_leaves_the_watermark_to_those_who_run(world, watermark):
    here = world(num_blocks=20, max_num_seqs=20, max_num_batched_tokens=1000, watermark=watermark)
    for _ in range(20):
        here.one(4, 3)
    here.step()
    assert here.memory.num_free == math.ceil(watermark * 20)
    here.run()


@pytest.mark.usefixtures("continuous")
def test_recompute_forgets_and_computes_again(world):
    here, requests = crowd(world)
    here.run()
    assert all(r.finish_reason == "length" for r in requests)
    assert here.scheduler.preemptions == sum(r.preemptions for r in requests) > 0
    computed = sum(step.num_tokens for step in here.executor.steps)
    assert computed == 4 * (3 + 9) + here.scheduler.recomputed_tokens


@pytest.mark.usefixtures("continuous")
def test_what_was_swapped_is_not_computed_again(world):
    here, requests = crowd(world, preemption="swap")
    here.run()
    assert all(r.finish_reason == "length" for r in requests)
    assert here.swap.saved.total() == here.scheduler.preemptions > 0
    assert here.scheduler.recomputed_tokens == 0
    assert sum(step.num_tokens for step in here.executor.steps) == 4 * (3 + 9)


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("faults", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)], ids=["full", "forgetful"])
@pytest.mark.parametrize("pieces", [{}, {"enable_chunked_prefill": False, "max_num_batched_tokens": 6}], ids=str)
def test_a_store_that_keeps_nothing_costs_a_recomputation_and_nothing_else(world, faults, pieces):
    here, requests = crowd(world, preemption="swap", faults=faults, **pieces)
    here.run()
    assert all(r.finish_reason == "length" for r in requests)
    assert here.scheduler.recomputed_tokens > 0


@pytest.mark.usefixtures("continuous")
def test_others_run_while_a_sequence_is_on_its_way_back(world):
    here, requests = crowd(world, preemption="swap", faults=(0.0, 1.0, 0.0))
    here.run()
    assert all(r.finish_reason == "length" for r in requests) and here.swap.saved


@pytest.mark.usefixtures("continuous")
def test_the_oldest_is_never_rejected_and_those_who_are_hear_it(world):
    here, requests = crowd(world, preemption="reject")
    here.run()
    gone = [r for r in requests if r.finish_reason == "abort"]
    assert gone and requests[0] not in gone
    assert {r.stop_reason for r in gone} == {"out of KV blocks"}


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("preemption", PRESSURES)
def test_a_prompt_that_is_half_computed_gives_its_blocks_to_those_who_generate(world, preemption):
    """It is the last of the order: in the step in which it is chosen nothing of it may be scheduled."""
    here = world(num_blocks=9, page=4, max_num_batched_tokens=4, preemption=preemption)
    old = here.one(4, 20)
    here.step()
    here.step()
    new = here.one(28, 3)
    while not (new.preemptions or new.finish_reason):
        here.step()
    assert old.num_computed_tokens > 0 and not new.output_token_ids
    here.run()
    assert old.finish_reason == "length"


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_with_prefill_first_nobody_comes_in_to_be_put_out_in_the_same_step(world, preemption):
    here = world(num_blocks=8, page=3, max_num_seqs=8, step_priority="prefill", preemption=preemption)
    requests = [here.one(3, 12) for _ in range(8)]
    while here.live:
        running, before = set(here.scheduler.running), {r: r.preemptions for r in requests}
        here.step()
        assert all(r in running for r in requests if r.preemptions > before[r])
    assert here.scheduler.preemptions > 0


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("policy", POLICIES)
def test_there_is_always_progress(world, policy, preemption, ahead):
    """Far too little memory, and all fight for it: steps stay within what `World.bound` derives."""
    ratios = []
    for seed in range(4):
        dice = random.Random(seed)
        here = world(
            num_blocks=12, page=2, scheduling_policy=policy, preemption=preemption, ahead=ahead, max_num_seqs=6
        )
        for _ in range(12):
            here.add(dice.randint(1, 14), dice.randint(1, 9), dice.choice([1, 1, 3]), priority=dice.randint(0, 2))
        most = here.bound()
        ratios.append(here.run(most) / most)
        assert here.scheduler.preemptions > 0
    assert max(ratios) < 1
