"""config.json of published models, without the keys that a cost does not depend on: `titan predict --model <name>`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
_LLAMA3: dict[str, Any] = {**_LLAMA, "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


PUBLISHED: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        # this repository's own, phase0_prototype/models/titan-tiny
        "titan-tiny": {
            **_LLAMA,
            **_sizes(256, 640, 8, 4),
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 4096,
            "tie_word_embeddings": True,
        },
        # TinyLlama/TinyLlama-1.1B-Chat-v1.0
        "tinyllama-1.1b": {**_LLAMA, **_sizes(2048, 5632, 22, 32), "num_key_value_heads": 4, "vocab_size": 32000},
        # meta-llama/Meta-Llama-3-8B, -70B, Llama-3.1-405B
        "llama3-8b": {**_LLAMA3, **_sizes(4096, 14336, 32, 32)},
        "llama3-70b": {**_LLAMA3, **_sizes(8192, 28672, 80, 64)},
        "llama3-405b": {**_LLAMA3, **_sizes(16384, 53248, 126, 128)},
        # mistralai/Mixtral-8x7B-v0.1
        "mixtral-8x7b": {
            "architectures": ["MixtralForCausalLM"],
            **_sizes(4096, 14336, 32, 32),
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        # Qwen/Qwen3-30B-A3B, Qwen3-235B-A22B
        "qwen3-30b-a3b": {**_QWEN3_MOE, **_sizes(2048, 6144, 48, 32), "moe_intermediate_size": 768},
        "qwen3-235b-a22b": {**_QWEN3_MOE, **_sizes(4096, 12288, 94, 64), "moe_intermediate_size": 1536},
        # deepseek-ai/DeepSeek-V3
        "deepseek-v3": {
            "architectures": ["DeepseekV3ForCausalLM"],
            **_sizes(7168, 18432, 61, 128),
            "vocab_size": 129280,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "first_k_dense_replace": 3,
            "tie_word_embeddings": False,
        },
    }
)
