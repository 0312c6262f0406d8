"""The engine with 8-bit caches: every query sees quantised keys and values, however its tokens were computed."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from phase0_prototype.errors import UserError
from phase0_prototype.quality import read_held_out
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import random_prompt, with_files
from phase3_paged_attention import calibrate
from phase3_paged_attention.kv_format import FORMATS
from phase3_paged_attention.kv_scales import FILE, KVScales, settle_scales, write_scales
from phase3_paged_attention.layers import QuantisedAttention
from phase3_paged_attention.measures import kv_quality

NAMES = ("fp8_e4m3", "fp8_e5m2", "fp8_per_token_head")
PROMPTS = [random_prompt(length, seed=3) for length in (19, 1, 30, 8)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0)


class Rounding(DynamicCache):
    """A cache of transformers that returns what 8 bits leave of a key or a value: [B, Hkv, T, D]."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(self.rounded(key_states), self.rounded(value_states), *args, **kwargs)

    def rounded(self, x):
        top = 448 if self.kind.dtype == torch.float8_e4m3fn else 57344
        scale = x.abs().amax(-1, keepdim=True) / top if self.kind.per_token else torch.ones(())
        return (x / scale).clamp(-top, top).to(self.kind.dtype).to(x.dtype) * scale


def tokens_of(outputs):
    return [completion.token_ids for output in outputs for completion in output.outputs]


def logprobs_of(output):
    """Of the prompt's tokens but the first."""
    told = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return torch.tensor([candidates[token].logprob for token, candidates in told])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3", "mistral-window"])
def test_it_says_what_transformers_says_with_rounded_keys_and_values(variant, name, checkpoint, load):
    made = checkpoint(variant)
    exact = [logprobs_of(output) for output in load(made).generate(PROMPTS, GREEDY)]
    off = []
    for output, unrounded in zip(load(made, kv_cache_dtype=name).generate(PROMPTS, GREEDY), exact, strict=True):
        said = output.outputs[0].token_ids
        ids = torch.tensor([output.prompt_token_ids + said])
        with torch.no_grad():
            logits = made.oracle(ids, past_key_values=Rounding(FORMATS[name]), use_cache=True).logits[0]
        length = len(output.prompt_token_ids)
        assert said == logits[length - 1 : -1].argmax(-1).tolist()
        theirs = logits.log_softmax(-1)[torch.arange(length - 1), ids[0, 1:length]]
        torch.testing.assert_close(logprobs_of(output), theirs, rtol=0, atol=2e-3)
        off.append(float((logprobs_of(output) - unrounded).abs().max()) if length > 1 else 0.0)
    assert max(off) > 0.02  # the cache was read: a prompt's own keys and values too


@pytest.mark.parametrize("name", NAMES)
def test_chunks_pages_preemption_and_forks_change_no_token(name, checkpoint, load):
    made = checkpoint("llama-gqa")
    sampled = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=9)
    params = [replace(GREEDY, prompt_logprobs=None)] * 3 + [sampled]
    alone = load(made, kv_cache_dtype=name)
    expected = tokens_of(alone.generate(PROMPTS, params))
    assert alone.engine.kv.copied_blocks > 0 and len(set(map(tuple, expected[3:]))) == 3
    few = {"num_blocks": 16, "block_size": 4, "max_model_len": 64, "watermark": 0}
    for settings in (
        {"max_num_batched_tokens": 7},
        {"block_size": 3, "max_num_seqs": 2},
        {**few, "preemption": "recompute"},
        {**few, "preemption": "swap"},
    ):
        llm = load(made, kv_cache_dtype=name, **settings)
        assert tokens_of(llm.generate(PROMPTS, params)) == expected, settings
        if "preemption" in settings:
            assert llm.engine.scheduler.preemptions > 0
        assert llm.engine.kv.num_free == llm.engine.kv.tables.num_blocks


def test_a_token_takes_half_the_bytes_of_bfloat16_and_scales_by_token_are_counted(checkpoint, load):
    made = checkpoint("llama-gqa")
    plain = load(made, dtype="bfloat16").engine.model
    for name, scales in (("fp8", 0), ("fp8_e5m2", 0), ("fp8_per_token_head", 2 * 2 * 2 * 4)):
        model = load(made, dtype="bfloat16", kv_cache_dtype=name).engine.model
        assert model.kv_spec.bytes_per_token == plain.kv_spec.bytes_per_token // 2 + scales
        assert model.weight_bytes == plain.weight_bytes


def test_latents_have_a_format_of_their_own_and_say_so_in_one_line(deepseek, checkpoint, load):
    for source, name, said in (
        (deepseek("v3"), "fp8_e5m2", "is for keys and values, this model has latents: give fp8_ds_mla"),
        (deepseek("v3"), "fp8_ds_mla", "latents of 32 . 8 numbers can't be packed"),
        (checkpoint("llama-gqa"), "fp8_ds_mla", "is for latents: give fp8_e4m3 or fp8_per_token_head"),
    ):
        with pytest.raises(UserError, match=f"kv_cache_dtype='{name}'.*{said}") as caught:
            load(source, kv_cache_dtype=name)
        assert "\n" not in str(caught.value)


# Scales for each tensor


def scales_in(llm):
    return [
        [scale.item() for scale in block.scales]
        for block in llm.engine.model.modules()
        if isinstance(block, QuantisedAttention)
    ]


@pytest.mark.parametrize("spelled", ["{side}_scale", "{side}_proj.{side}_scale", "attn.{side}_scale"])
def test_scales_of_the_checkpoint_are_read_by_every_name(spelled, checkpoint, load, tmp_path):
    made = checkpoint("llama-gqa")
    path = with_files(made.path, tmp_path / "scaled", model=None)
    values = {"k": (0.5, 0.25), "v": (0.125, 2.0)}
    stored = {
        f"model.layers.{i}.self_attn.{spelled.format(side=side)}": torch.tensor(both[i]).expand([1] * i).clone()
        for side, both in values.items()
        for i in range(2)
    }
    save_file({**load_file(made.path / "model.safetensors"), **stored}, path / "model.safetensors")
    assert scales_in(load(path, kv_cache_dtype="fp8")) == [[0.5, 0.125], [0.25, 2.0]]
    load(path)  # who keeps no such cache needs no scales
    load(path, kv_cache_dtype="fp8_per_token_head")
    for name in stored:
        stored[name] = torch.zeros(1)
    save_file({**load_file(made.path / "model.safetensors"), **stored}, path / "model.safetensors")
    with pytest.raises(UserError, match=r"k_scale is 0\.0: a scale of the KV cache is a number above 0"):
        load(path, kv_cache_dtype="fp8")


def test_scales_come_from_the_file_beside_a_checkpoint_that_has_none(checkpoint, load, tmp_path):
    path = with_files(checkpoint("llama-gqa").path, tmp_path / "calibrated")
    write_scales(path / FILE, KVScales("fp8_e4m3", 9, (0.5, 0.25), (0.125, 2.0)))
    llm = load(path, kv_cache_dtype="fp8")
    settle_scales(llm.engine.model, path)
    assert scales_in(llm) == [[0.5, 0.125], [0.25, 2.0]]
    (path / FILE).write_text(json.dumps({"kv_cache_dtype": "fp8", "tokens": 9, "k_scale": [1.0]}))
    with pytest.raises(UserError, match="k_scale has 1 numbers, the model has 2 layers"):
        settle_scales(load(checkpoint("llama-gqa"), kv_cache_dtype="fp8").engine.model, path)


def test_without_scales_they_are_1_and_a_warning_says_how_to_find_them(checkpoint, load, caplog):
    made = checkpoint("llama-gqa")
    for name, lines in (("fp8", 1), ("fp8_per_token_head", 0)):
        llm = load(made, kv_cache_dtype=name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            settle_scales(llm.engine.model, made.path)
        assert caplog.text.count("titan calibrate-kv") == lines
        if lines:
            assert scales_in(llm) == [[1.0, 1.0]] * 2


def test_calibration_finds_the_largest_key_and_value_of_every_layer(checkpoint, load):
    made = checkpoint("llama-gqa")
    llm = load(made, max_model_len=33, num_blocks=3)
    documents = ["def add(a, b):\n    return a + b\n" * 3, "class Stack:\n" * 9]
    found = calibrate.scales_for(llm, "fp8", documents, 60)
    windows = [llm.engine.tokenizer.encode(text)[:32] for text in documents]
    windows[1] = windows[1][: 60 - 32]
    assert found.tokens == 60
    for layer in range(2):
        for side, scales in (("keys", found.k_scale), ("values", found.v_scale)):
            largest = 0.0
            for ids in windows:
                cache = made.oracle.model(torch.tensor([ids]), use_cache=True).past_key_values
                largest = max(largest, float(getattr(cache.layers[layer], side).detach().abs().max()))
            assert scales[layer] * 448 == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kv_cache_dtype": "fp8_per_token_head"}, "has no scales to calibrate"),
        ({"kv_cache_dtype": "int4"}, "'int4' has no scales"),
        ({"tokens": 0}, "tokens=0"),
        ({"out": "/nowhere/at/all.json", "tokens": 9}, "/nowhere/at/all.json can't be written"),
    ],
    ids=str,
)
def test_calibration_refuses_in_one_line(arguments, named, checkpoint):
    with pytest.raises(UserError, match=named) as caught:
        calibrate.calibrate(str(checkpoint("llama-gqa").path), **arguments)
    assert "\n" not in str(caught.value)


def test_the_command_ships_scales_of_titan_tiny_that_it_finds_again(tmp_path):
    said = calibrate.calibrate("titan-tiny", tokens=1024, out=tmp_path / "scales.json")
    assert "8 layers, 1,024 tokens" in said
    shipped = json.loads((calibrate.resolve_model("titan-tiny") / FILE).read_text())
    fewer = json.loads((tmp_path / "scales.json").read_text())
    for side in ("k_scale", "v_scale"):
        assert all(0.5 * all_ <= few <= 1.01 * all_ for all_, few in zip(shipped[side], fewer[side], strict=True))


def test_8_bits_cost_less_than_a_percent_of_perplexity():
    longest = max(read_held_out(), key=lambda document: len(document.text))
    found = kv_quality.losses([replace(longest, text=longest.text[:3500])], 10_000)
    assert found["auto"].tokens > 500
    for name in NAMES:
        assert 0 < abs(kv_quality.worse_by(found[name], found["auto"])) < 1, name
