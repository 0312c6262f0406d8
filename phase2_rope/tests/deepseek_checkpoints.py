"""Tiny random DeepSeek checkpoints with dense layers, written by `transformers`, which also says what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phase0_prototype.tests.checkpoints import SIZES, Checkpoint, save

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ATTENTION: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "rms_norm_eps": 1e-6,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("DeepseekV2", {}),
    "v2-no-q-lora": ("DeepseekV2", {"q_lora_rank": None}),
    "v2-yarn": ("DeepseekV2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "v2-biases": ("DeepseekV2", {"attention_bias": True, "mlp_bias": True}),
    "v3": ("DeepseekV3", {}),
    "v3-no-q-lora": ("DeepseekV3", {"q_lora_rank": None}),
    "v3-yarn": ("DeepseekV3", {"rope_parameters": YARN}),
    "v3-yarn-no-mscale-all-dim": ("DeepseekV3", {"rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None}}),
    "v3-halves": ("DeepseekV3", {"rope_interleave": False}),
    "v3-values-wider": ("DeepseekV3", {"v_head_dim": 40, "qk_nope_head_dim": 12}),
    "v3-biases-no-q-lora": ("DeepseekV3", {"attention_bias": True, "q_lora_rank": None}),
    "v3-other-eps": ("DeepseekV3", {"rms_norm_eps": 1e-2}),
}


def write(variant: str, path: Path) -> Checkpoint:
    """The checkpoint of a variant."""
    family, changes = VARIANTS[variant]
    return save(family, {**SIZES, **ATTENTION, **changes}, path, seed=sum(map(ord, variant)), attention="eager")
