"""The engine without a model: the tokens and the pace that it promises, and everything else the real thing."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest

from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase0_prototype.tokenizer import load_tokenizer
from phase4_scheduler.loop import AheadLoop, Loop
from phase4_scheduler.memory import CountedMemory, CountedSwap
from phase4_scheduler.null_engine import TEXT, TOKENIZER, build_null
from phase4_scheduler.null_executor import NullExecutor


def request(name, prompt=3, tokens=4, seed=0, n=1, **more):
    return Request(name, [1] * prompt, SamplingParams(n=n), seed, (), tokens, **more)


def turn(engine):
    """Run until nobody is left; returns the requests' tokens by name."""
    said = {}
    while engine.loop.has_unfinished():
        done = engine.loop.step()
        for r, row in zip(done.requests, done.rows, strict=True):
            said.setdefault(r.request_id, []).append(done.token_ids[row])
    return said


def test_a_step_takes_its_time_and_steps_wait_for_one_another():
    """Launched at once, and ten milliseconds and one a token later each."""
    executor = NullExecutor(0.01, 0.001, text=(5, 6, 7))
    step = Step((ScheduledRequest(request("a"), 0, 3),))
    began = time.perf_counter()
    launched = [executor.launch(step) for _ in range(3)]
    pauses = [later.due - earlier.due for earlier, later in itertools.pairwise(launched)]
    assert min(pauses) == pytest.approx(0.013), "the second is launched while the first runs"
    for number, one in enumerate(launched, start=1):
        assert executor.collect(one).token_ids == [5]
        assert time.perf_counter() - began >= 0.013 * number
    time.sleep(0.02)
    idle = time.perf_counter()
    executor.collect(executor.launch(step))
    assert time.perf_counter() - idle >= 0.013, "an idle device works ahead"


def test_steps_one_ahead_leave_the_device_no_pause():
    """Host and device by turns take the sum of both; one ahead, the larger of the two. Sleeps stand for the host."""
    seconds = {"off": math.inf, "on": math.inf}
    for scheduling in ("off", "on") * 3:
        engine = build_null({"step_seconds": 0.01, "async_scheduling": scheduling})
        engine.loop.scheduler.add(request("a", tokens=25))
        began = time.perf_counter()
        while engine.loop.has_unfinished():
            engine.loop.step()
            time.sleep(0.008)
        seconds[scheduling] = min(seconds[scheduling], time.perf_counter() - began)
    print(f"25 steps of 10 ms beside 8 ms of Python: {seconds['off']:.2f} s, one ahead {seconds['on']:.2f} s")
    assert seconds["off"] > 25 * 0.018 and seconds["on"] < seconds["off"]


@pytest.mark.parametrize("scheduling", ["off", "on"])
def test_an_answer_is_the_text_from_its_seed_on_in_any_company(scheduling):
    text = load_tokenizer(TOKENIZER).encode(TEXT)
    engine = build_null({"step_seconds": 0.0, "async_scheduling": scheduling, "max_num_batched_tokens": 7})
    for seed in range(5):
        engine.loop.scheduler.add(request(str(seed), prompt=4 * seed + 1, tokens=50 + seed, seed=seed))
    said = turn(engine)
    assert said == {str(s): [text[(s + i) % len(text)] for i in range(50 + s)] for s in range(5)}


@pytest.mark.parametrize("preemption", ["recompute", "swap", "reject"])
def test_blocks_are_counted_like_real_ones(preemption):
    settings = {"step_seconds": 0, "max_model_len": 64, "num_blocks": 8, "block_size": 8, "watermark": 0.0}
    engine = build_null({**settings, "preemption": preemption, "swap_blocks": 8})
    dice, scheduler = random.Random(0), engine.loop.scheduler
    for i in range(15):
        prompt, tokens = dice.randint(1, 30), dice.randint(1, 30)
        for k in range(2):
            scheduler.add(request(f"{i}.{k}", prompt, tokens, seed=i, n=2, index=k, group=str(i)))
    said = turn(engine)
    assert scheduler.kv.num_free == engine.config.blocks == 8 and not scheduler.kv.tables.tables
    assert preemption == "reject" or (scheduler.preemptions > 0 and len(said) == 30)
    assert (scheduler.swap is None) == (preemption != "swap")
    if scheduler.swap is not None:
        assert not scheduler.swap.kept and scheduler.swap.free == 8


def test_a_swap_has_the_room_that_it_was_given():
    engine = build_null({"preemption": "swap", "swap_blocks": 3})
    memory, swap = engine.loop.scheduler.kv, engine.loop.scheduler.swap
    assert isinstance(memory, CountedMemory) and isinstance(swap, CountedSwap)
    small, large = request("small"), request("large")
    small.num_computed_tokens, large.num_computed_tokens = 17, 18 + 16
    assert swap.out(small) and not swap.out(large) and swap.free == 1
    assert swap.back(small) and swap.free == 3


def test_auto_is_one_step_ahead():
    assert type(build_null({}).loop) is AheadLoop
    assert type(build_null({"async_scheduling": "off"}).loop) is Loop


def test_ten_thousand_requests_leave_nothing_behind():
    """Whatever is noted of a request is forgotten with it: a server runs for months."""
    engine = build_null({"step_seconds": 0.0, "max_num_seqs": 64, "preemption": "swap", "swap_blocks": 64})
    scheduler, dice = engine.loop.scheduler, random.Random(0)
    later = time.monotonic() + 3600
    for i in range(10_000):
        made = request(str(i), dice.randint(1, 40), dice.randint(1, 6), seed=i, deadline=later)
        scheduler.add(made)
        if dice.random() < 0.1:
            scheduler.abort(made)
        if dice.random() < 0.4:
            engine.loop.step()
    turn(engine)
    sizes = {name: len(value) for name, value in vars(scheduler).items() if isinstance(value, dict | list)}
    assert set(sizes.values()) == {0}, sizes
    assert scheduler._watchful == 0 and scheduler.kv.num_free == engine.config.blocks
