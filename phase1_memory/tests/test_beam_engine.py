"""Beam search through the paged engine: what `transformers` finds, a prompt computed once, and no block left behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from phase0_prototype.errors import UserError
from phase1_memory.beam_search import BeamSearchParams
from phase1_memory.llm import LLM
from phase1_memory.tests.beam_oracle import hf_beams, tiny_llama

PAGE, BLOCKS = 4, 80
LENGTHS = (5, 8, 13)  # inside a page, at its end, and several pages


@pytest.fixture(scope="module")
def oracle():
    return tiny_llama(0, ends=(3, 9))


@pytest.fixture(scope="module")
def llm(oracle, tmp_path_factory, use):
    folder = tmp_path_factory.mktemp("beams")
    oracle.save_pretrained(folder)
    settings = {"block_size": PAGE, "num_blocks": BLOCKS, "max_model_len": 100, "runner": "eager", "use": use}
    return LLM(str(folder), dtype="float32", device="cpu", **settings)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, 96, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize(("early_stopping", "length_penalty"), [(False, 1.0), (True, 0.0), ("never", 2.0)])
def test_prompts_searched_together_find_what_transformers_finds_for_each(
    llm, oracle, prompts, width, early_stopping, length_penalty
):
    params = BeamSearchParams(width, 20, length_penalty, early_stopping)
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        expected = hf_beams(oracle, prompt, params)
        assert [c.token_ids for c in output.outputs] == [tokens for tokens, _ in expected]
        scores = [c.cumulative_logprob / len(c.token_ids) ** length_penalty for c in output.outputs]
        assert scores == pytest.approx([score for _, score in expected], abs=1e-4)
    assert llm.engine.kv.num_free == BLOCKS


def test_so_do_prompts_that_must_wait_for_each_others_blocks(llm, oracle, prompts):
    params = BeamSearchParams(4, 30)
    few = llm.engine.kv.tables.num_blocks // 34 * prompts  # together they could need far more than there are
    for prompt, output in zip(few, llm.beam_search(few, params), strict=True):
        assert [c.token_ids for c in output.outputs] == [tokens for tokens, _ in hf_beams(oracle, prompt, params)]
    assert llm.engine.kv.num_free == BLOCKS


def test_a_search_leaves_a_stream_alone(llm, prompts):
    from phase0_prototype.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = llm.generate(prompts[0], params, progress=False)[0].outputs[0].token_ids
    stream = llm.stream(prompts[0], params)
    next(stream)
    found = llm.beam_search(prompts[1], BeamSearchParams(3, 8))
    assert list(stream)[-1].outputs[0].token_ids == alone
    assert found[0].outputs[0].token_ids == llm.beam_search(prompts[1], BeamSearchParams(3, 8))[0].outputs[0].token_ids


def test_the_end_token_is_among_the_tokens_and_finishes_the_sequence(llm, prompts):
    ended = [
        c for o in llm.beam_search(prompts, BeamSearchParams(4, 40)) for c in o.outputs if c.token_ids[-1] in (3, 9)
    ]
    assert ended and all(c.finish_reason == "stop" and c.stop_reason is None for c in ended)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beam_width": 60, "max_tokens": 50}, r"60 beams of 5 \+ 50 tokens can need \d+ blocks, 80 are free"),
        ({"max_tokens": 99}, "prompt 0 has 5 tokens, with max_tokens 99"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_runs(llm, prompts, change, said):
    before = llm.engine.runner.forward_passes
    with pytest.raises(UserError, match=said):
        llm.beam_search(prompts[0], dataclasses.replace(BeamSearchParams(2, 8), **change))
    assert llm.engine.runner.forward_passes == before and llm.engine.kv.num_free == BLOCKS


def test_an_interrupted_search_gives_its_blocks_back(llm, prompts, monkeypatch):
    forward, calls = llm.engine.runner.forward, 0

    def interrupted(batch):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.beam_search(prompts, BeamSearchParams(4, 20))
    assert llm.engine.kv.num_free == BLOCKS


class TestSharing:
    """Counts that only an implementation reaches which shares blocks."""

    def test_the_prompt_is_computed_once_and_each_beam_a_token_a_step(self, llm, prompts, sharing):
        before = llm.engine.runner.forward_tokens
        llm.beam_search(prompts[2], BeamSearchParams(4, 6, ignore_eos=True))
        assert llm.engine.runner.forward_tokens - before == len(prompts[2]) + 5 * 4

    def test_full_blocks_of_the_prompt_are_never_copied(self, llm, prompts, sharing):
        before = llm.engine.kv.copied_blocks
        llm.beam_search(prompts[1], BeamSearchParams(4, 1, ignore_eos=True))
        assert llm.engine.kv.copied_blocks == before
