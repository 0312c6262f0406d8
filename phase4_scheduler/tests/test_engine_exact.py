"""What an engine says to a request does not depend on who else is there: greedy tokens of each alone (transformers, or
phase 0's engine), and under load, in pieces, swapped, computed again, beside others that are aborted or late.
"""

from __future__ import annotations

import random

import pytest

from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import random_prompt
from phase0_prototype.tests.conftest import one_thread  # noqa: F401  the same fixture here
from phase4_scheduler import LLM as NAMED_BY_THE_PACKAGE
from phase4_scheduler.llm import LLM
from phase4_scheduler.tests.turned import Turned

LENGTHS = (1, 40, 7, 2, 19, 33, 60, 5)
NEW = (25, 12, 20, 3, 25, 1, 9, 18)
VARIANTS = ("llama-gqa", "mistral-window", "deepseek-v3")
TIGHT = {"block_size": 8, "num_blocks": 14, "max_model_len": 96, "watermark": 0, "max_num_batched_tokens": 24}
LOADS = {
    "fcfs, recompute": {"preemption": "recompute"},
    "sjf, swap": {"preemption": "swap", "scheduling_policy": "sjf", "async_scheduling": "on"},
    "priority, recompute, prefill first": {"scheduling_policy": "priority", "step_priority": "prefill"},
    "ageing, swap, whole prompts": {
        "preemption": "swap",
        "scheduling_policy": "ageing",
        "enable_chunked_prefill": False,
        "async_scheduling": "on",
    },
    "reject": {"preemption": "reject", "async_scheduling": "on", "long_prefill_token_threshold": 5},
}


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, **more)


@pytest.fixture(scope="module")
def alone(tiny):
    """By variant, (prompt, tokens) that transformers continues with, one prompt at a time."""
    known = {}

    def get(variant):
        if variant not in known:
            made = tiny(variant)
            prompts = [random_prompt(length, seed=2) for length in LENGTHS]
            known[variant] = [(p, made.greedy(p, n)) for p, n in zip(prompts, NEW, strict=True)]
        return known[variant]

    return get


def under_load(turned, known, dice, neighbours):
    """Requests whose answers are known come at any time, and `neighbours` that go again; returns (request, answer)."""
    coming = [(prompt, answer, i) for i, (prompt, answer) in enumerate(known)] * 3
    dice.shuffle(coming)
    asked, guests = [], []
    while coming or turned.loop.has_unfinished():
        if coming and dice.random() < 0.4:
            prompt, answer, group = coming.pop()
            more = {"priority": dice.randint(0, 2), "group": f"group {group}"}
            asked.append((turned.add(prompt, greedy(len(answer)), **more), answer))
        if neighbours and dice.random() < 0.2:
            patience = dice.choice([None, 0.01, 0.1])
            prompt = random_prompt(dice.randint(1, 50), seed=dice.randint(0, 99))
            params = SamplingParams(max_tokens=dice.randint(1, 30), seed=1)
            guests.append(turned.add(prompt, params, priority=dice.randint(0, 2), patience=patience))
            neighbours -= 1
        if guests and dice.random() < 0.1:
            turned.scheduler.abort(guests.pop(dice.randrange(len(guests))))
        if turned.loop.has_unfinished():
            turned.step()
    turned.run()
    return asked


def test_the_package_names_the_llm():
    assert NAMED_BY_THE_PACKAGE is LLM


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_answer_under_load_is_the_one_it_gets_alone(variant, name, tiny, load, alone):
    llm = load(tiny(variant), **{**TIGHT, **LOADS[name]})
    asked = under_load(Turned(llm), alone(variant), random.Random(sum(map(ord, name))), neighbours=20)
    rejected = [request for request, _ in asked if request.finish_reason == "abort"]
    for request, answer in asked:
        if request in rejected:
            assert request.stop_reason == "out of KV blocks"
            assert request.output_token_ids == answer[: len(request.output_token_ids)]
        else:
            assert (request.output_token_ids, request.finish_reason) == (answer, "length")
    assert bool(rejected) == (name == "reject")
    if name != "reject":
        assert llm.engine.scheduler.preemptions > 0, "there was memory enough"


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 1}, TIGHT], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_offline_api_says_what_transformers_says(variant, settings, tiny, load, alone):
    llm = load(tiny(variant), **settings)
    prompts, right = zip(*alone(variant), strict=True)
    outputs = llm.generate(list(prompts), [greedy(len(answer)) for answer in right])
    assert [output.outputs[0].token_ids for output in outputs] == list(right)
    assert llm.engine.kv.num_free == llm.engine.kv.tables.num_blocks


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_seeded_answers_to_one_prompt_are_those_of_phase_0(preemption, tiny, load):
    """n answers share the prompt's blocks; a seed says the same in any company."""
    from phase0_prototype.llm import LLM as PrototypeLLM

    made = tiny("llama-gqa")
    prompts = [random_prompt(length, seed=5) for length in (21, 4, 30, 9)]
    params = [SamplingParams(n=n, max_tokens=14, seed=n, temperature=0.8) for n in (4, 1, 3, 2)]
    oracle = PrototypeLLM(made.path, dtype="float32", device="cpu", runner="eager", use="phase0=solution")
    llm = load(made, preemption=preemption, **TIGHT)
    said, right = (
        [[c.token_ids for c in output.outputs] for output in engine.generate(prompts, params)]
        for engine in (llm, oracle)
    )
    assert said == right


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("ahead", ["off", "on"])
def test_titan_tiny_writes_the_same_code_under_load(ahead, load):
    """Its answers alone are phase 0's."""
    from phase0_prototype.llm import LLM as PrototypeLLM

    texts = ["def add(a, b):", "class Stack:\n    def push(self", "import os\n", "for i in range("]
    oracle = PrototypeLLM("titan-tiny", dtype="float32", device="cpu", runner="eager", use="phase0=solution")
    outputs = [
        oracle.generate(text, greedy(count, ignore_eos=True))[0] for text, count in zip(texts, NEW, strict=False)
    ]
    known = [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]
    tight = {"num_blocks": 9, "block_size": 8, "max_model_len": 64, "watermark": 0, "max_num_batched_tokens": 8}
    llm = load("titan-tiny", async_scheduling=ahead, preemption="swap", **tight)
    asked = under_load(Turned(llm), known, random.Random(3), neighbours=4)
    assert [request.output_token_ids for request, _ in asked] == [answer for _, answer in asked]
    assert llm.engine.scheduler.preemptions > 0
