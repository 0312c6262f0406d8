"""The whole engine against `transformers`, in float32: the same logits, and the same greedy tokens one by one."""

from __future__ import annotations

import pytest
import torch

from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import CONTEXT, VARIANTS, random_prompt

LENGTHS = (1, 40, 7, 2, 19)  # prompts of one batch
NEW = (64, 66, 90, 120, 65)  # tokens for each: they end at different times
SHOWN_BY_GENERATE = (1, 3)  # checked against transformers' own loop; the others against its argmax, which is cheaper


def greedy(tokens: int, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, **more)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_a_mixed_batch_are_those_of_transformers(variant, checkpoint, load):
    made = checkpoint(variant)
    prompts = [random_prompt(length) for length in LENGTHS]
    outputs = load(made, max_num_seqs=len(prompts)).generate(prompts, [greedy(n) for n in NEW])
    for i, (prompt, output, count) in enumerate(zip(prompts, outputs, NEW, strict=True)):
        (completion,) = output.outputs
        assert len(completion.token_ids) == count
        assert completion.finish_reason == "length"
        if i in SHOWN_BY_GENERATE:
            assert completion.token_ids == made.greedy(prompt, count)
        else:  # each token is the argmax after all those before it
            best = made.logits(prompt + completion.token_ids)[len(prompt) - 1 : -1].argmax(-1)
            assert completion.token_ids == best.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_prompt_and_decode_are_those_of_transformers(variant, checkpoint, load):
    made = checkpoint(variant)
    llm = load(made)
    seen = []
    forward = llm.engine.runner.forward

    def spy(batch):
        logits = forward(batch)
        seen.append(logits.clone())
        return logits

    llm.engine.runner.forward = spy
    prompt = random_prompt(60)
    (output,) = llm.generate(prompt, greedy(16, prompt_logprobs=0))
    expected = made.logits(prompt + output.outputs[0].token_ids[:-1])
    assert (torch.cat(seen) - expected).abs().max() <= 1e-4


def test_more_prompts_than_rows_and_than_the_token_budget_change_nothing(checkpoint, load):
    made = checkpoint("llama-gqa")
    prompts = [random_prompt(length, seed=1) for length in (30, 1, 12, 50, 3, 9, 21)]
    params = [greedy(n) for n in (5, 20, 1, 9, 33, 2, 17)]
    outputs = load(made, max_num_seqs=3, max_num_batched_tokens=20).generate(prompts, params)
    for prompt, wanted, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == made.greedy(prompt, wanted.max_tokens)


def test_a_sequence_may_fill_the_context_to_its_last_position(checkpoint, load):
    made = checkpoint("mistral-window")
    prompt = random_prompt(150)
    (output,) = load(made).generate(prompt, greedy(CONTEXT, ignore_eos=True))
    assert len(prompt) + len(output.outputs[0].token_ids) == CONTEXT
    assert output.outputs[0].token_ids == made.greedy(prompt, CONTEXT - len(prompt))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen2", "qwen3-tied"])
def test_half_precision_stays_near_float32(variant, dtype, checkpoint, load):
    """Rounding may flip a token, so probabilities are compared, at the positions of a given text."""
    made = checkpoint(variant)
    prompt = random_prompt(50)
    (output,) = load(made, dtype=dtype).generate(prompt, greedy(1, prompt_logprobs=0))
    own = torch.tensor([p[t].logprob for p, t in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)])
    expected = made.logprobs(prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert (own - expected).abs().max() < (0.5 if dtype == "bfloat16" else 0.08)
    assert (own - expected).abs().mean() < (0.08 if dtype == "bfloat16" else 0.01)
