"""The engine of phase 2 on the models of phase 0: the same tokens, and rope types that phase 0 refuses."""

from __future__ import annotations

import pytest

from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import CONTEXT, VARIANTS, random_prompt
from phase2_rope import LLM as NAMED_BY_THE_PACKAGE
from phase2_rope.llm import LLM
from phase2_rope.tests.conftest import ORIGINAL

PROMPTS = [random_prompt(length, seed=2) for length in (1, 40, 7, 2, 19, 33)]
NEW = (30, 12, 44, 3, 25, 20)


def greedy(count):
    return SamplingParams(temperature=0, max_tokens=count)


PARAMS = [greedy(count) for count in NEW]


def tokens_of(outputs):
    return [o.outputs[0].token_ids for o in outputs]


def test_the_package_names_the_llm():
    assert NAMED_BY_THE_PACKAGE is LLM


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_says_what_transformers_says(variant, checkpoint, load):
    made = checkpoint(variant)
    for prompt, new, said in zip(PROMPTS, NEW, tokens_of(load(made).generate(PROMPTS, PARAMS)), strict=True):
        best = made.logits(prompt + said)[len(prompt) - 1 : -1].argmax(-1)
        assert said == best.tolist() and len(said) == new


@pytest.mark.parametrize("name", ["dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("length", [5, ORIGINAL - 4, ORIGINAL + 20])
def test_texts_that_pass_the_original_context_are_those_of_transformers(name, length, scaled, load):
    """Prompts below it, and below it until the answer passes, and beyond."""
    made = scaled(name)
    prompt = random_prompt(length)
    (output,) = load(made).generate(prompt, greedy(40))
    made.logits(prompt[:1])  # a short text: the oracle forgets the frequencies of the longest that it has seen
    assert output.outputs[0].token_ids == made.greedy(prompt, 40)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 9},
        {"block_size": 3},
        {"num_blocks": 8, "max_model_len": 120, "watermark": 0},
    ],
    ids=str,
)
def test_what_depends_on_a_length_depends_on_no_neighbour(name, settings, scaled, load):
    """One request's frequencies are its own: batched, in chunks, or computed again after its blocks were taken."""
    made = scaled(name)
    prompts = [random_prompt(n, seed=4) for n in (6, ORIGINAL - 3, 50, 2)]
    params = [greedy(n) for n in (50, 30, 20, 35)]
    alone = [tokens_of(load(made).generate(p, q))[0] for p, q in zip(prompts, params, strict=True)]
    llm = load(made, **settings)
    assert tokens_of(llm.generate(prompts, params)) == alone
    if "num_blocks" in settings:
        assert llm.engine.scheduler.preemptions > 0


def test_a_stretched_context_may_be_filled(scaled, load):
    llm = load(scaled("dynamic"))
    assert llm.engine.max_model_len == 4 * ORIGINAL
    (output,) = llm.generate(random_prompt(100), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 28
    assert load(scaled("yarn")).engine.max_model_len == CONTEXT


@pytest.mark.parametrize("name", ["dynamic", "longrope", "yarn"])
def test_a_compiled_step_says_the_same(name, scaled, load):
    prompt = random_prompt(ORIGINAL - 6)
    plain = tokens_of(load(scaled(name), max_num_seqs=1).generate(prompt, greedy(20)))
    assert tokens_of(load(scaled(name), max_num_seqs=1, runner="compile").generate(prompt, greedy(20))) == plain
