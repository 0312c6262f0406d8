"""The engine of phase 3 on a CPU: the tokens of `transformers`, whatever the pages, chunks, neighbours and memory."""

from __future__ import annotations

import pytest

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import SIZES, VARIANTS, random_prompt, save
from phase2_rope.tests.deepseek_checkpoints import ATTENTION
from phase3_paged_attention import LLM as NAMED_BY_THE_PACKAGE
from phase3_paged_attention.llm import LLM

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


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "max_num_batched_tokens": 9},
        {"block_size": 3},
        {"block_size": 2, "num_blocks": 64, "max_model_len": 96, "watermark": 0},
        {"num_blocks": 8, "max_model_len": 96, "watermark": 0, "preemption": "swap"},
    ],
    ids=str,
)
def test_neighbours_chunks_pages_and_preemption_change_no_token(settings, checkpoint, load):
    made = checkpoint("llama-gqa")
    alone = [made.greedy(p, n) for p, n in zip(PROMPTS, NEW, strict=True)]
    llm = load(made, **settings)
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == alone
    if "num_blocks" in settings:
        assert llm.engine.scheduler.preemptions > 0
    assert llm.engine.kv.num_free == llm.engine.kv.tables.num_blocks


@pytest.mark.parametrize("variant", ["v2", "v3"])
def test_latents_go_the_same_way(variant, deepseek, load):
    made = deepseek(variant)
    prompt = random_prompt(20)
    (output,) = load(made).generate(prompt, greedy(12))
    assert output.outputs[0].token_ids == made.greedy(prompt, 12)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A DeepSeek whose latents fill a group of 128 numbers."""
    sizes = {**SIZES, **ATTENTION, "kv_lora_rank": 128}
    return save("DeepseekV3", sizes, tmp_path_factory.mktemp("wide"), seed=7, attention="eager")


def test_packed_latents_say_the_same_however_they_are_cut(wide, load):
    plain, packed = load(wide), load(wide, kv_cache_dtype="fp8_ds_mla")
    assert packed.engine.kv.spec.bytes_per_token == 2 * (128 + 4 + 2 * 8)
    assert plain.engine.kv.spec.bytes_per_token == 2 * (128 + 8) * 4
    said = tokens_of(packed.generate(PROMPTS, PARAMS))
    chunks = {"max_num_batched_tokens": 7, "block_size": 3}
    assert tokens_of(load(wide, kv_cache_dtype="fp8_ds_mla", **chunks).generate(PROMPTS, PARAMS)) == said
    prompt = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (exact,), (close,) = (llm.generate(PROMPTS[1], prompt) for llm in (plain, packed))
    pairs = zip(exact.prompt_logprobs[1:], close.prompt_logprobs[1:], strict=True)
    off = [abs(value.logprob - b[token].logprob) for a, b in pairs for token, value in a.items()]
    assert 0 < max(off) < 0.2


def test_a_compiled_step_says_the_same(checkpoint, load):
    made = checkpoint("llama-gqa")
    prompt = random_prompt(12)
    (output,) = load(made, max_num_seqs=1, runner="compile").generate(prompt, greedy(12))
    assert output.outputs[0].token_ids == made.greedy(prompt, 12)


def test_a_backend_that_can_not_run_here_says_why_in_one_line(checkpoint, load):
    with pytest.raises(UserError, match=r"kernels need a GPU, not cpu.*Those that can: torch") as error:
        load(checkpoint("llama-gqa"), attention_backend="triton")
    assert "\n" not in str(error.value)


def test_settings_that_do_not_exist_are_one_line(checkpoint, load):
    with pytest.raises(UserError, match=r"attention_backend='cuda' is not allowed: give auto, triton"):
        load(checkpoint("llama-gqa"), attention_backend="cuda")
    with pytest.raises(UserError, match=r"kv_cache_dtype='fp4' is not allowed: give auto, "):
        load(checkpoint("llama-gqa"), kv_cache_dtype="fp4")
