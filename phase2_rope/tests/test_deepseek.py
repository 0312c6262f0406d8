"""DeepSeek models in the engine: what `transformers` says in float32, through pages, chunks, batches and pressure."""

from __future__ import annotations

import json

import pytest
import torch

from phase0_prototype.config import parse_config
from phase0_prototype.errors import ConfigError
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import CONTEXT, random_prompt, with_files
from phase2_rope.deepseek import ARCHITECTURES, score_scale
from phase2_rope.shapes import TINY, V2_LITE_DENSE, checkpoint, tensor_shapes
from phase2_rope.tests.deepseek_checkpoints import VARIANTS

LENGTHS = (1, 40, 7, 2, 19)
NEW = (40, 30, 50, 60, 25)
PROMPTS = [random_prompt(length) for length in LENGTHS]


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, **more)


PARAMS = [greedy(count) for count in NEW]


def tokens_of(outputs):
    return [[c.token_ids for c in output.outputs] for output in outputs]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_prompt_and_decode_are_those_of_transformers(variant, deepseek, load):
    made = deepseek(variant)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_a_mixed_batch_are_those_of_transformers(variant, deepseek, load):
    made = deepseek(variant)
    outputs = load(made, max_num_seqs=len(PROMPTS)).generate(PROMPTS, PARAMS)
    for i, (prompt, output, count) in enumerate(zip(PROMPTS, outputs, NEW, strict=True)):
        (completion,) = output.outputs
        if i == 1:
            assert completion.token_ids == made.greedy(prompt, count)
        else:
            best = made.logits(prompt + completion.token_ids)[len(prompt) - 1 : -1].argmax(-1)
            assert completion.token_ids == best.tolist()


@pytest.fixture(scope="module")
def alone(deepseek):
    """What transformers says to PROMPTS, one at a time."""
    return {v: [[deepseek(v).greedy(p, n)] for p, n in zip(PROMPTS, NEW, strict=True)] for v in ("v2-yarn", "v3")}


SETTINGS = {
    "chunks of 7": {"max_num_batched_tokens": 7},
    "pages of 3": {"block_size": 3},
    "one at a time": {"max_num_seqs": 1},
    "recomputed": {"num_blocks": 10, "max_model_len": 96, "watermark": 0, "block_size": 16},
    "swapped": {"num_blocks": 10, "max_model_len": 96, "watermark": 0, "block_size": 16, "preemption": "swap"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("variant", ["v2-yarn", "v3"])
def test_chunks_pages_and_pressure_change_no_token(variant, name, deepseek, load, alone):
    llm = load(deepseek(variant), **SETTINGS[name])
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == alone[variant]
    if name in ("recomputed", "swapped"):
        assert llm.engine.scheduler.preemptions > 0


def test_several_answers_share_the_latents_of_their_prompt(deepseek, load):
    llm = load(deepseek("v3"))
    prompt = random_prompt(50)
    params = SamplingParams(n=4, temperature=0.9, seed=3, max_tokens=12)
    (output,) = llm.generate(prompt, params)
    assert llm.engine.runner.forward_tokens == 50 + 4 * 11
    for completion in output.outputs:
        again = load(deepseek("v3")).engine
        assert again.kv.num_free == again.kv.tables.num_blocks
        assert len(completion.token_ids) == 12
    assert len({tuple(c.token_ids) for c in output.outputs}) > 1


def test_a_compiled_step_says_the_same(deepseek, load, alone, use):
    if "phase2_rope=framework" in str(use.complete()) or "phase2=framework" in str(use.complete()):
        pytest.skip("one form of the step is enough")
    llm = load(deepseek("v3"), runner="compile", max_num_seqs=1)
    assert tokens_of(llm.generate(PROMPTS[1:2], PARAMS[1:2])) == alone["v3"][1:2]


def test_a_sequence_may_fill_the_context(deepseek, load):
    made = deepseek("v3-yarn")
    prompt = random_prompt(150)
    (output,) = load(made).generate(prompt, greedy(CONTEXT, ignore_eos=True))
    assert output.outputs[0].token_ids == made.greedy(prompt, CONTEXT - len(prompt))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype, deepseek, load):
    made = deepseek("v3-yarn")
    prompt = random_prompt(50)
    (output,) = load(made, dtype=dtype).generate(prompt, greedy(1, prompt_logprobs=0))
    own = torch.tensor([p[t].logprob for p, t in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)])
    expected = made.logprobs(prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert (own - expected).abs().mean() < (0.08 if dtype == "bfloat16" else 0.01)


# Memory


def test_a_token_of_v3_leaves_1152_bytes_a_layer(load):
    """576 numbers, where keys and values of its 128 heads would be 81,920 bytes."""
    raw = {**V2_LITE_DENSE, "num_hidden_layers": 1, "first_k_dense_replace": 1, "vocab_size": 512}
    with checkpoint({**raw, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}) as path:
        llm = load(path, dtype="bfloat16", num_blocks=4)
        kv = llm.engine.kv
        assert kv.spec.bytes_per_token == 1152
        assert kv.block_bytes == 16 * 1152
        assert sum(side.nbytes for side in kv.layer(0)) == (4 + 1) * 16 * 1152


def test_what_a_block_holds_survives_a_copy(deepseek, load):
    llm = load(deepseek("v3"))
    llm.generate(PROMPTS, PARAMS)
    kv = llm.engine.kv
    before = kv.read([0, 3])
    kv.write([5, 1], before)
    assert torch.equal(kv.read([5, 1]), before) and before.shape == (2, kv.block_bytes)
    assert torch.equal(kv.layer(1)[0][5], kv.layer(1)[0][0])


# Configs


def config(**changes):
    return parse_config({**TINY, **changes}, architectures=ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_routed_experts": 8, "first_k_dense_replace": 1}, "first_k_dense_replace is 1.*experts, which phase 6"),
        ({"n_routed_experts": 8, "first_k_dense_replace": None}, "first_k_dense_replace is null"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7: expected an even number"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": "x", "mscale_all_dim": 1}}, "numbers and lists of numbers"),
        ({"rope_scaling": {"type": "yarn", "mscale_all_dim": 1}}, "factor = None"),
    ],
)
def test_a_config_that_can_not_be_is_one_line(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_model_whose_first_layers_cover_all_is_dense():
    assert config(n_routed_experts=8, first_k_dense_replace=2).latent.entry == 40


@pytest.mark.parametrize(("mscale", "squared"), [(0.707, 1.5896), (1.0, 1.8739)])
def test_the_scale_carries_yarns_m_squared(mscale, squared):
    """V2-Lite's and V3's published values, at a factor of 40."""
    changed = {**V2_LITE_DENSE["rope_scaling"], "mscale": mscale, "mscale_all_dim": mscale}
    rope = parse_config({**V2_LITE_DENSE, "rope_scaling": changed}, architectures=ARCHITECTURES).rope
    assert score_scale(rope, 192) * 192**0.5 == pytest.approx(squared, abs=1e-4)


def test_layers_that_predict_further_tokens_are_left_in_the_file(deepseek, load, tmp_path):
    from safetensors.torch import load_file, save_file

    made = deepseek("v3")
    path = with_files(made.path, tmp_path / "mtp", config={"num_nextn_predict_layers": 1})
    (path / "model.safetensors").unlink()
    tensors = load_file(made.path / "model.safetensors")
    save_file({**tensors, "model.layers.2.enorm.weight": torch.ones(64)}, path / "model.safetensors")
    assert tokens_of(load(path).generate(PROMPTS[1], PARAMS[1])) == [[made.greedy(PROMPTS[1], NEW[1])]]


@pytest.mark.parametrize("variant", ["v2", "v2-no-q-lora", "v3", "v3-biases-no-q-lora"])
def test_random_checkpoints_have_the_tensors_of_transformers(variant, deepseek):
    made = deepseek(variant)
    raw = json.loads((made.path / "config.json").read_text())
    shapes = tensor_shapes(parse_config(raw, architectures=ARCHITECTURES))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in made.oracle.state_dict().items()}
