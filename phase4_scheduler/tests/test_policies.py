"""Who goes first, on a simulated clock: what each order promises, and the bound that ageing gives to waiting."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from module0_profiling.course.parts import resolve
from phase4_scheduler.scheduler_config import POLICIES, SchedulerConfig
from phase4_scheduler.tests.scheduling import World

SECOND = 10  # steps


@pytest.fixture(scope="module", autouse=True)
def _orders(use):
    policies = resolve("phase4_scheduler", "policies", use)
    if not policies.make_policy(SchedulerConfig(scheduling_policy="priority")).preemptive:
        pytest.skip("there is one order here: task 4.2")


def begins(here):
    """In the order in which they were first computed."""
    seen = dict.fromkeys(request for step in here.executor.steps for request in step.requests)
    return list(seen)


def simulate(here, trace):
    """Run a trace of (second, prompt, tokens, attributes).

    Returns:
        For each, (request, second of its first step, second of its first token).
    """
    here.clock.now = start = 1.0
    coming, made, first = sorted(trace, key=lambda t: t[0]), [], {}
    while coming or here.live:
        while coming and start + coming[0][0] <= here.clock.now:
            at, prompt, tokens, more = coming.pop(0)
            made.append(here.one(prompt, tokens, arrival=start + at, **more))
        launched = len(here.executor.steps)
        if here.live:
            here.step()
        for request in (r for step in here.executor.steps[launched:] for r in step.requests):
            first.setdefault(request, [here.clock.now, None])
        for request in made:
            if request.output_token_ids and first[request][1] is None:
                first[request][1] = here.clock.now
        here.clock.now += 1 / SECOND
    return [(request, *first[request]) for request in made]


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_has_its_order(world, policy):
    here = world(max_num_seqs=1, scheduling_policy=policy, ageing_rate=100.0)
    kinds = [(8, 9, 2), (4, 4, 0), (9, 9, 1), (3, 3, 2), (4, 4, 1)]
    requests = []
    for prompt, tokens, priority in kinds:
        requests.append(here.one(prompt, tokens, priority=priority))
        here.clock.now += 0.08  # worth 8 tokens of work where waiting counts
    here.run()
    orders = {
        "fcfs": [0, 1, 2, 3, 4],
        "priority": [1, 2, 4, 0, 3],
        "sjf": [3, 1, 4, 0, 2],
        "ageing": [1, 0, 3, 2, 4],  # 8 + 8, 17 + 0, 6 + 24, 18 + 16, 8 + 32
    }
    assert [requests.index(r) for r in begins(here)] == orders[policy]


@pytest.mark.parametrize("seed", range(5))
def test_one_at_a_time_shortest_first_waits_least_of_all_orders(world, seed):
    """Against all 120 orders of five requests, each of which takes a step for its prompt's token and each of answer."""
    dice = random.Random(seed)
    work = [dice.randint(2, 30) for _ in range(5)]
    here = world(max_num_seqs=1, scheduling_policy="sjf")
    waited = [at - 1.0 for _, at, _ in simulate(here, [(0.0, 1, tokens, {}) for tokens in work])]
    least = min(sum(itertools.accumulate(order[:-1], initial=0)) for order in itertools.permutations(work))
    assert sum(waited) * SECOND == pytest.approx(least)


@pytest.mark.parametrize("seed", range(3))
def test_shortest_first_has_the_least_mean_wait_of_the_policies_under_load(parts, seed):
    dice = random.Random(seed)
    trace = []
    at = 0.0
    for _ in range(120):
        at += dice.expovariate(1 / 0.65)
        trace.append((at, dice.randint(1, 20), dice.choice([4, 4, 60]), {"priority": dice.randint(0, 3)}))
    mean = {}
    for policy in POLICIES:
        here = World(*parts, max_num_seqs=3, scheduling_policy=policy, ageing_rate=5.0)
        mean[policy] = statistics.mean(first - r.arrival for r, _, first in simulate(here, trace))
    print({policy: round(seconds, 2) for policy, seconds in mean.items()})
    assert all(mean["sjf"] < mean[policy] for policy in POLICIES if policy != "sjf")
    assert mean["ageing"] < mean["fcfs"]


# Ageing: nobody waits for ever


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    trace=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(1, 12)), min_size=2, max_size=14),
    rate=st.sampled_from([2.0, 10.0, 40.0]),
    seqs=st.integers(1, 3),
    num_blocks=st.sampled_from([16, 100]),
    preemption=st.sampled_from(["recompute", "swap"]),
    first=st.sampled_from(["decode", "prefill"]),
    chunked=st.booleans(),
    ahead=st.booleans(),
)
def test_who_comes_later_than_work_over_rate_does_not_begin_before(
    parts, trace, rate, seqs, num_blocks, preemption, first, chunked, ahead
):
    """For every trace: a request of work w that came at t is passed by nobody who came after t + w / rate."""
    here = World(
        *parts,
        num_blocks=num_blocks,
        page=2,
        max_num_seqs=seqs,
        max_num_batched_tokens=8,
        scheduling_policy="ageing",
        ageing_rate=rate,
        preemption=preemption,
        step_priority=first,
        enable_chunked_prefill=chunked,
        ahead=ahead,
    )
    met = simulate(here, [(at / SECOND, prompt, tokens, {}) for at, prompt, tokens in trace])
    for (long, began, token), (late, late_began, late_token) in itertools.permutations(met, 2):
        work = len(long.prompt_token_ids) + long.max_tokens
        if late.arrival > long.arrival + work / rate:
            assert began <= late_began and token <= late_token


def long_among_short(parts, policy, seconds=60, rate=20.0):
    """A long request, and for so long short ones, somewhat more than can be served. Seconds it waited for its turn."""
    here = World(*parts, max_num_seqs=2, scheduling_policy=policy, ageing_rate=rate)
    trace = [(0.5, 30, 70, {"priority": 1})]
    trace += [(i * 0.25, 4, 6, {"priority": 0}) for i in range(seconds * 4)]
    (request, began, _), *_ = [met for met in simulate(here, trace) if met[0].max_tokens == 70]
    return began - request.arrival


@pytest.mark.parametrize("policy", ["sjf", "priority"])
def test_a_stream_of_short_requests_starves_a_long_one_for_as_long_as_it_lasts(parts, policy):
    waited = [long_among_short(parts, policy, seconds) for seconds in (20, 40)]
    print(f"{policy}: it waits {waited[0]:.1f} s and {waited[1]:.1f} s of a stream of 20 s and 40 s")
    assert waited[0] > 19 and waited[1] > 39


def test_with_ageing_it_begins_after_work_over_rate_and_those_who_came_before(parts):
    """100 tokens of work at 20 a second: 5 s, in which at most 22 short ones came, of 7 steps each, two at a time."""
    rate = 20.0
    waited = [long_among_short(parts, "ageing", seconds, rate) for seconds in (20, 40)]
    print(f"ageing: it waits {waited[0]:.1f} s and {waited[1]:.1f} s")
    assert waited[0] == waited[1] <= (0.5 + 100 / rate) * 4 * 7 / 2 / SECOND


# Long ones give way


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize(("policy", "more"), [("sjf", {}), ("priority", {"priority": 1}), ("ageing", {})])
def test_a_long_request_gives_its_place_to_a_short_one_and_gets_it_back(world, policy, more, preemption):
    here = world(max_num_seqs=1, scheduling_policy=policy, preemption=preemption, ageing_rate=1.0)
    long = here.one(10, 60, **more)
    for _ in range(10):
        here.step()
    kept = len(long.output_token_ids)
    short = here.one(3, 3)
    here.step()
    assert short.output_token_ids and long.preemptions == 1 and len(long.output_token_ids) == kept
    here.run()
    assert here.told == [short, long] and long.finish_reason == "length"
    assert here.scheduler.recomputed_tokens == (0 if preemption == "swap" else 10 + kept - 1)


def test_by_arrival_nobody_gives_way_but_for_memory(world):
    here = world(max_num_seqs=1, scheduling_policy="fcfs")
    long = here.one(10, 40)
    here.step()
    here.one(1, 1)
    here.run()
    assert long.preemptions == 0 and here.told[0] is long


@pytest.mark.parametrize("n", [1, 3])
def test_an_urgent_request_takes_the_memory_of_others_too(world, n):
    """Forks share blocks: what becomes free when all of them go is counted."""
    here = world(num_blocks=10, page=4, scheduling_policy="priority")
    here.add(16, 12, n, priority=5, eos_token_ids=())
    for _ in range(3):
        here.step()
    urgent = here.one(32, 3, priority=0)
    here.step()
    here.step()
    assert urgent.output_token_ids
    here.run()


def test_a_prompt_in_pieces_is_no_wall_before_an_urgent_one(world):
    """The urgent prompt's tokens come first, though the other began before."""
    here = world(num_blocks=200, scheduling_policy="priority", max_num_batched_tokens=16)
    here.one(320, 2, priority=1)
    here.step()
    urgent = here.one(16, 2, priority=0)
    here.step()
    assert urgent.output_token_ids
    here.run()
