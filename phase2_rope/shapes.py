"""Random checkpoints with latent attention: which tensors they have, and shapes to measure with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from phase0_prototype.checkpoint import tensor_shapes as dense_shapes
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.config import ModelConfig
from phase2_rope.deepseek import ARCHITECTURES, DeepseekConfig

YARN: Mapping[str, Any] = MappingProxyType(
    {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
)
V2_LITE_DENSE: Mapping[str, Any] = MappingProxyType(
    {
        # DeepSeek-V2-Lite with 6 layers, all dense, and a vocabulary of 32,000: its attention at 1/4 of the size
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "first_k_dense_replace": 6,
        "hidden_act": "silu",
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": dict(YARN),
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
TINY: Mapping[str, Any] = MappingProxyType(
    {
        **V2_LITE_DENSE,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "first_k_dense_replace": 2,
        "max_position_embeddings": 256,
        "rope_scaling": {**YARN, "factor": 4, "original_max_position_embeddings": 64},
    }
)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model in Hugging Face's names, in the order of the forward pass. Linears are [out, in]."""
    if not isinstance(config, DeepseekConfig):
        return dense_shapes(config)
    spec, hidden = config.latent, config.hidden_size
    queries = spec.num_heads * spec.query
    attention: dict[str, tuple[int, ...]] = {}
    if config.q_lora_rank is None:
        attention["q_proj.weight"] = (queries, hidden)
    else:
        attention["q_a_proj.weight"] = (config.q_lora_rank, hidden)
        attention["q_a_layernorm.weight"] = (config.q_lora_rank,)
        attention["q_b_proj.weight"] = (queries, config.q_lora_rank)
    attention["kv_a_proj_with_mqa.weight"] = (spec.entry, hidden)
    attention["kv_a_layernorm.weight"] = (spec.latent,)
    attention["kv_b_proj.weight"] = (spec.num_heads * (spec.nope + spec.value), spec.latent)
    attention["o_proj.weight"] = (hidden, spec.num_heads * spec.value)
    if config.attention_bias:
        biased = ("o_proj", "kv_a_proj_with_mqa", *(["q_a_proj"] if config.q_lora_rank else []))
        attention |= {f"{name}.bias": (attention[f"{name}.weight"][0],) for name in biased}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in dense_shapes(config).items():
        if ".self_attn." not in name:
            shapes[name] = shape
        elif name.endswith("q_proj.weight"):  # the first of a layer's attention: all of it goes here
            prefix = name.removesuffix("q_proj.weight")
            shapes |= {prefix + part: size for part, size in attention.items()}
    return shapes


@contextmanager
def checkpoint(shape: Mapping[str, Any], dtype: str = "bfloat16") -> Iterator[Path]:
    """A seeded random checkpoint that is gone afterwards."""
    with TemporaryDirectory(prefix="titan-mla-") as folder:
        yield write_checkpoint(
            dict(shape), Path(folder) / "model", dtype=dtype, architectures=ARCHITECTURES, tensors=tensor_shapes
        )
