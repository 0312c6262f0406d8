"""One step ahead says what one step after the other says, whatever is asked for and whatever goes wrong meanwhile."""

from __future__ import annotations

import math

import pytest

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import random_prompt
from phase0_prototype.tests.conftest import one_thread  # noqa: F401  the same fixture here
from phase4_scheduler.tests.scheduling import World
from phase4_scheduler.tests.turned import Turned, Watched

PROMPTS = [random_prompt(length, seed=2) for length in (1, 40, 7, 2, 19, 33)]
NEW = (20, 12, 24, 3, 25, 1)
STOPS = list(range(0, 320, 9))  # a token in nine
POISON = 77

ASKED = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 40},
    "stop tokens": {"temperature": 1.0, "stop_token_ids": STOPS},
    "not before": {"temperature": 1.0, "stop_token_ids": STOPS, "min_tokens": 9},
    "logprobs": {"temperature": 1.0, "logprobs": 3, "stop_token_ids": STOPS},
    "of the prompt": {"logprobs": 1, "prompt_logprobs": 2},
    "three answers": {"temperature": 1.0, "n": 3, "stop_token_ids": STOPS, "logprobs": 1, "prompt_logprobs": 1},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
}
PRESSED = {"block_size": 8, "num_blocks": 14, "max_model_len": 96, "watermark": 0, "max_num_batched_tokens": 16}
SETTINGS = {"room": {}, "recompute": PRESSED, "swap": {**PRESSED, "preemption": "swap"}}


def asked(name):
    more = {"temperature": 0, "min_tokens": 0, **ASKED[name]}
    least = more.pop("min_tokens")
    return [SamplingParams(max_tokens=n, seed=i, min_tokens=min(n, least), **more) for i, n in enumerate(NEW * 2)]


def said(outputs):
    return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in o.outputs] for o in outputs]


def same_values(found, right):
    """Two lists of log-probabilities by position; None where nothing predicts a token."""
    assert (found is None) == (right is None)
    for position, other in zip(found or (), right or (), strict=True):
        assert (position is None) == (other is None) and list(position or ()) == list(other or ())
        for token, value in (position or {}).items():
            assert math.isclose(value.logprob, other[token].logprob, abs_tol=1e-4)
            assert value.rank == other[token].rank


@pytest.fixture(scope="module")
def made(tiny):
    return tiny("llama-gqa")


@pytest.fixture(scope="module")
def ahead_of_itself(parts):
    """For tests of steps that are launched while another runs."""
    here = World(*parts, ahead=True)
    here.one(2, 9)
    for _ in range(3):
        here.step()
    if not here.executor.on_its_way:
        pytest.skip("each step is waited for here: task 4.3")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ASKED)
def test_it_says_the_same(name, settings, made, load):
    params = asked(name)
    right = load(made, async_scheduling="off").generate(PROMPTS * 2, params)
    llm = load(made, async_scheduling="on", **settings)
    outputs = llm.generate(PROMPTS * 2, params)
    assert said(outputs) == said(right)
    for output, other in zip(outputs, right, strict=True):
        same_values(output.prompt_logprobs, other.prompt_logprobs)
        for answer, known in zip(output.outputs, other.outputs, strict=True):
            same_values(answer.logprobs, known.logprobs)
    assert llm.engine.kv.num_free == llm.engine.kv.tables.num_blocks


@pytest.mark.usefixtures("ahead_of_itself", "continuous")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ASKED)
def test_steps_are_ahead_and_memory_does_run_out_in_these_tests(name, settings, made, load):
    llm = load(made, async_scheduling="on", **settings)
    llm.engine.loop.executor = watched = Watched(llm.engine.loop.executor)
    llm.generate(PROMPTS * 2, asked(name))
    assert (llm.engine.scheduler.preemptions > 0) == bool(settings)
    # Penalties need the token that is being chosen: such steps are never launched on top of another.
    ahead = sum(watched.ahead) / len(watched.ahead)
    assert ahead == 0 if name == "penalties" else ahead > 0.8


@pytest.mark.usefixtures("ahead_of_itself")
def test_one_request_with_penalties_holds_the_steps_back_only_as_long_as_it_is_there(made, load):
    turned = Turned(load(made, async_scheduling="on"))
    turned.loop.executor = watched = Watched(turned.loop.executor)
    turned.add(PROMPTS[1], SamplingParams(temperature=0, max_tokens=40))
    turned.add(PROMPTS[2], SamplingParams(temperature=0, max_tokens=10, repetition_penalty=1.2))
    turned.run()
    assert not any(watched.ahead[:10]) and all(watched.ahead[12:])


@pytest.mark.usefixtures("ahead_of_itself")
def test_the_row_that_was_computed_for_nothing_never_shows(made, load):
    """A stop token is known one step late: a step was launched with its sequence, and its token is dropped."""
    turned = Turned(load(made, async_scheduling="on"))
    turned.loop.executor = watched = Watched(turned.loop.executor)
    requests = [
        turned.add(p, SamplingParams(max_tokens=60, seed=i, stop_token_ids=STOPS)) for i, p in enumerate(PROMPTS)
    ]
    turned.run()
    rows = sum(len(step.sampling) for step in watched.steps)
    stopped = [r for r in requests if r.finish_reason == "stop"]
    assert stopped and rows == sum(len(r.output_token_ids) for r in requests) + len(stopped)
    for request in stopped:
        assert [token in STOPS for token in request.output_token_ids].index(True) == len(request.output_token_ids) - 1


@pytest.mark.parametrize("ahead", ["off", "on"])
def test_who_is_aborted_while_a_step_runs_says_nothing_more_and_disturbs_nobody(made, load, ahead):
    turned = Turned(load(made, async_scheduling=ahead))
    params = SamplingParams(temperature=0, max_tokens=20)
    requests = [turned.add(prompt, params) for prompt in PROMPTS]
    for gone in requests[::2]:
        for _ in range(3):
            turned.step()
        turned.scheduler.abort(gone)
        before = list(turned.shown[gone])
        turned.step()
        assert turned.shown[gone] == before and gone not in turned.told
    turned.run()
    for prompt, request in zip(PROMPTS[1::2], requests[1::2], strict=True):
        assert request.output_token_ids == made.greedy(prompt, 20)


@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("ahead", ["off", "on"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_after_a_step_that_failed_everybody_begins_anew(made, load, preemption, ahead, where):
    turned = Turned(load(made, async_scheduling=ahead, preemption=preemption, **PRESSED))
    turned.loop.executor = watched = Watched(turned.loop.executor)
    requests = [turned.add(p, SamplingParams(temperature=0, max_tokens=n)) for p, n in zip(PROMPTS, NEW, strict=True)]
    failures = 0
    for number in range(10_000):
        if not turned.loop.has_unfinished():
            break
        watched.failing = where if number % 9 == 5 else ""
        try:
            turned.step()
        except RuntimeError:
            failures += 1
    turned.run()
    assert failures > 3
    for prompt, count, request in zip(PROMPTS, NEW, requests, strict=True):
        assert request.output_token_ids == made.greedy(prompt, count)


@pytest.mark.parametrize("ahead", ["off", "on"])
def test_logits_that_are_no_numbers_end_their_request_alone_and_leave_nothing_behind(made, load, ahead):
    """Its blocks hold NaN, and others get them next."""
    llm = load(made, async_scheduling=ahead, **PRESSED)
    llm.engine.model.embed_tokens.weight.data[POISON] = math.nan
    turned = Turned(llm)
    params = SamplingParams(temperature=0, max_tokens=20)
    clean = [[token for token in prompt if token != POISON] or [1] for prompt in PROMPTS]
    bad, good = [], []
    for round_ in range(3):
        for i, prompt in enumerate(clean):
            place = (i + round_) % (len(prompt) + 1)
            bad.append(turned.add([*prompt[:place], POISON, *prompt[place:]], params))
            good.append(turned.add(prompt, params))
    turned.run()
    assert {(r.finish_reason, len(r.output_token_ids)) for r in bad} == {("error", 0)}
    right = [made.greedy(prompt, 20) for prompt in clean]
    assert not any(POISON in tokens for tokens in right)
    assert [r.output_token_ids for r in good] == right * 3
    assert len(turned.told) == len(bad) + len(good)


def test_a_model_of_the_learners_is_not_run_ahead(tiny, load):
    with pytest.raises(UserError, match=r"async_scheduling=on needs phase0=solution, not framework"):
        load(tiny("llama-gqa"), async_scheduling="on", use="phase0=framework")
