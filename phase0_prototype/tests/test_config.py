"""config.json -> ModelConfig. The oracle is transformers' AutoConfig on the same content."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from phase0_prototype.checkpoint import SHAPES
from phase0_prototype.config import ARCHITECTURES, ModelConfig, load_config, parse_config
from phase0_prototype.errors import ConfigError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,  # so that Qwen's and Mistral's default numbers of KV heads divide it
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def raw(model: str, **changes: Any) -> dict[str, Any]:
    """A small config.json. `model` is llama, mistral, qwen2 or qwen3; a change to ... removes the key."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    full = {"architectures": [names[model] + "ForCausalLM"], "model_type": model, **SIZES, **changes}
    return {key: value for key, value in full.items() if value is not ...}


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{model} with nothing but sizes": raw(model) for model in ("llama", "mistral", "qwen2", "qwen3")},
    "llama grouped heads": raw("llama", num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True),
    "llama null heads and head_dim": raw("llama", num_key_value_heads=None, head_dim=None),
    "llama head_dim of its own": raw("llama", head_dim=16),
    "llama biases": raw("llama", attention_bias=True, mlp_bias=True),
    "llama 3 old spelling": raw(
        "llama",
        rope_theta=500000.0,
        max_position_embeddings=8192,
        rope_scaling={"rope_type": "llama3", **LLAMA3_SCALING},
        eos_token_id=[5, 6],
    ),
    "llama 3 new spelling": raw(
        "llama",
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_SCALING},
    ),
    "rope type spelt `type`": raw("llama", rope_scaling={"type": "linear", "factor": 2.0}),
    "rope_scaling null": raw("llama", rope_scaling=None, rope_theta=123.0),
    "yarn without original length": raw("qwen2", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "mistral with window": raw("mistral", sliding_window=7),
    "mistral without window": raw("mistral", sliding_window=None, num_key_value_heads=2, dtype="float16"),
    "qwen2 window unused": raw("qwen2", sliding_window=5, max_window_layers=1, num_key_value_heads=2),
    "qwen2 window from a layer on": raw("qwen2", sliding_window=5, max_window_layers=1, use_sliding_window=True),
    "qwen2 window by default size": raw("qwen2", max_window_layers=0, use_sliding_window=True),
    "qwen2 window from layer 28 on": raw("qwen2", num_hidden_layers=30, use_sliding_window=True),
    "qwen3 layer types": raw(
        "qwen3",
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        attention_bias=True,
        head_dim=16,
    ),
    "qwen3 null end token": raw("qwen3", eos_token_id=None, bos_token_id=3, torch_dtype="bfloat16"),
    **{f"shape {name}": shape for name, shape in SHAPES.items()},
}


def as_transformers_sees_it(content: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The same facts out of AutoConfig, and the biases and windows out of the modules that it builds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (directory / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(directory)
    dtype = config.dtype  # building the model sets it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = model.model.layers
    attention, mlp = layers[0].self_attn, layers[0].mlp
    windows = [
        config.sliding_window if config.model_type == "mistral" else getattr(layer.self_attn, "sliding_window", None)
        for layer in layers
    ]
    eos = config.eos_token_id
    rope = {
        key: value for key, value in config.rope_parameters.items() if key not in ("rope_type", "rope_theta", "type")
    }
    return {
        "architecture": type(model).__name__,
        "vocab_size": model.model.embed_tokens.weight.shape[0],
        "hidden_size": attention.q_proj.weight.shape[1],
        "intermediate_size": mlp.gate_proj.weight.shape[0],
        "num_layers": len(layers),
        "num_heads": attention.q_proj.weight.shape[0] // attention.head_dim,
        "num_kv_heads": attention.k_proj.weight.shape[0] // attention.head_dim,
        "head_dim": attention.head_dim,
        "rms_norm_eps": model.model.norm.variance_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "qkv_bias": attention.q_proj.bias is not None,
        "o_bias": attention.o_proj.bias is not None,
        "mlp_bias": mlp.down_proj.bias is not None,
        "qk_norm": hasattr(attention, "q_norm"),
        "sliding_windows": tuple(windows),
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "rope_type": config.rope_parameters["rope_type"],
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_parameters": rope,
    }


def as_we_see_it(config: ModelConfig) -> dict[str, Any]:
    facts = {f.name: getattr(config, f.name) for f in fields(ModelConfig) if f.default is MISSING and f.name != "rope"}
    return facts | {
        "rope_type": config.rope.rope_type,
        "rope_theta": config.rope.theta,
        "rope_parameters": dict(config.rope.parameters),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_config_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    config = parse_config(VARIANTS[name])
    assert as_we_see_it(config) == as_transformers_sees_it(VARIANTS[name], tmp_path)
    assert all(getattr(config, f.name) == f.default for f in fields(ModelConfig) if f.default is not MISSING)


def test_config_that_transformers_saved_reads_the_same(tmp_path: Path) -> None:
    """transformers writes the new spelling: rope_parameters, dtype, layer_types."""
    from transformers import AutoConfig

    content = {**SHAPES["llama3.2-1b"], "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert "rope_parameters" in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert load_config(tmp_path / "saved") == load_config(tmp_path / "config.json")


def test_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw("llama", eos_token_id=7)))
    assert load_config(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert load_config(tmp_path).eos_token_ids == (8, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert load_config(tmp_path).eos_token_ids == (7,)


def test_another_architecture_is_an_entry_in_a_mapping() -> None:
    content = raw("llama") | {"architectures": ["NewForCausalLM"]}
    with pytest.raises(ConfigError):
        parse_config(content)
    config = parse_config(
        content, architectures=dict(ARCHITECTURES) | {"NewForCausalLM": ARCHITECTURES["LlamaForCausalLM"]}
    )
    assert config.architecture == "NewForCausalLM"


def test_config_can_be_a_key_of_a_cache() -> None:
    content = VARIANTS["llama 3 old spelling"]
    assert len({parse_config(content), parse_config(dict(content))}) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            ["architectures", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"],
        ),
        ({"architectures": ...}, ["architectures", "missing"]),
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"hidden_size": "128"}, ["hidden_size", '"128"', "whole number"]),
        ({"hidden_size": 30}, ["hidden_size", "30", "num_attention_heads = 32"]),
        ({"hidden_size": True}, ["hidden_size", "true"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "at least 1"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "divisor"]),
        ({"head_dim": 7}, ["head_dim", "7", "even"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "-1"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps", "null"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes", "true or false"]),
        ({"rope_theta": 0}, ["rope_theta", "0"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "[1]"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters", "same for all layers"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ({"torch_dtype": "int8"}, ["torch_dtype", "int8", "bfloat16"]),
    ],
)
def test_nonsense_is_refused_in_one_line_naming_file_key_and_value(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw("llama", **changes), source="there/config.json")
    message = str(caught.value)
    assert "\n" not in message
    for word in ["there/config.json", *words]:
        assert word in message


@pytest.mark.parametrize("changes", [{"layer_types": ["full_attention"]}, {"layer_types": ["sliding_attention"] * 3}])
def test_layer_types_must_fit_layers_and_window(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(raw("qwen2", **changes))


@pytest.mark.parametrize(
    ("content", "word"), [(None, "does not exist"), ("{", "not JSON"), ("[]", "list"), (b"\xff\xfe", "UTF-8")]
)
def test_unreadable_file_is_one_line(content: str | bytes | None, word: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=word) as caught:
        load_config(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.5}, 10240),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 64}, 4096),
        ({"rope_type": "yarn", "factor": 2.0}, 8192),
        ({"rope_type": "llama3", **LLAMA3_SCALING}, 4096),
    ],
)
def test_a_scaling_stretches_what_a_model_may_be_asked_for(scaling: dict[str, Any], longest: int) -> None:
    assert parse_config(raw("llama", max_position_embeddings=4096, rope_scaling=scaling)).longest == longest
