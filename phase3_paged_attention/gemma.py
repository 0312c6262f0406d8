"""Gemma 2: attention scores and logits with soft caps, and a window in every other layer.

Source: Gemma 2 (arXiv 2408.00118), section 2, and the config of `transformers` (gemma2). What it does otherwise than
Llama are flags of ModelConfig; the decoder and its layers are those of all models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from phase0_prototype.config import Architecture, ModelConfig, decoder, windows_by_type
from phase0_prototype.config_fields import Fields
from phase2_rope.deepseek import ARCHITECTURES as EARLIER

GEMMA2_2B: Mapping[str, Any] = MappingProxyType(
    {
        # google/gemma-2-2b: 2.6 billion parameters, 0.6 of them the embedding
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
)


def gemma2(fields: Fields) -> ModelConfig:
    """Gemma 2 of 2B, 9B and 27B. Layers 0, 2, 4 … slide, unless `layer_types` says it layer by layer."""
    if fields.raw.get("use_bidirectional_attention"):
        fields.fail("use_bidirectional_attention", "false or null: tokens see those before them")
    layers, hidden = fields.integer("num_hidden_layers"), fields.integer("hidden_size")
    types = fields.raw.get("layer_types")
    if types is None:
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    bias = fields.boolean("attention_bias", False)
    plain = decoder(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        activation="gelu_tanh",
        activation_key="hidden_activation",
        sliding_windows=windows_by_type(fields, types, fields.integer_or_none("sliding_window", 4096)),
        default_kv_heads=4,
        default_head_dim=256,
        default_tied=True,
        default_max_positions=8192,
        default_bos=2,
        default_eos=1,
    )
    return replace(
        plain,
        offset_norms=True,
        output_norms=True,
        embedding_scale=hidden**0.5,
        score_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        score_cap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(fields, "final_logit_softcapping", 30.0),
    )


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({**EARLIER, "Gemma2ForCausalLM": gemma2})


def _cap(fields: Fields, key: str, default: float) -> float | None:
    return None if fields.raw.get(key, default) is None else fields.number(key, default)
