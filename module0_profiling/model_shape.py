"""The sizes of a model that its cost depends on, read from a Hugging Face config.json.

This is not the engine's config (a phase has its own, with everything that computing needs): a prediction wants many
architectures and few of their fields. The five sizes have no default, so that nobody is told the cost of another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from module0_profiling.published_models import PUBLISHED


class ModelError(ValueError):
    """A config that cannot be read as a model's sizes: one line with file and field."""

    is_user_error = True  # the command line prints it as one line


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (arXiv 2405.04434). `q_lora` 0: queries are projected in one step."""

    q_lora: int
    latent: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class MoE:
    """Mixture of experts: `shared` is the width of the shared expert in all, `dense_layers` have an ordinary MLP."""

    experts: int
    top_k: int
    intermediate: int
    shared: int = 0
    dense_layers: int = 0
    router_bias: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model.

    `windows`: for each layer, how many positions a token sees, itself included, None for all; () is all of them None.
    `intermediate` is the width of the dense MLPs. `output_norms`: what attention and MLP return is normed too.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    output_norms: bool = False
    windows: tuple[int | None, ...] = ()
    mla: MLA | None = None
    moe: MoE | None = None
    name: str = ""

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return self.layers - self.moe.dense_layers if self.moe else 0

    def window_counts(self) -> dict[int | None, int]:
        """Window -> number of layers that have it, in the order of their first layer."""
        counts: dict[int | None, int] = {}
        for window in self.windows or (None,) * self.layers:
            counts[window] = counts.get(window, 0) + 1
        return counts


def load_shape(model: str | Path | Mapping[str, Any]) -> ModelShape:
    """The shape of a bundled name, a directory with a config.json, a config file, or a config's content.

    Raises:
        ModelError: one line that names the file and the field.
    """
    if isinstance(model, Mapping):
        return shape_of(model, "config")
    bundled = PUBLISHED.get(str(model).lower())
    if bundled is not None:
        return replace(shape_of(bundled, str(model)), name=str(model).lower())
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_dir():
            raise ModelError(f"{path} holds no config.json: give a model's directory or its config.json") from None
        names = ", ".join(PUBLISHED)
        raise ModelError(f"model {str(model)!r}: no such file, and not one of the bundled {names}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{file} holds {type(raw).__name__}, expected an object with the fields of a config.json")
    return replace(shape_of(raw, str(file)), name=path.name if path.is_dir() else file.parent.name)


def shape_of(raw: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that a config's content describes; `source` names it in errors. Raises ModelError."""
    names = raw.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else names
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{source}: architectures is {names!r}, supported are {known}")
    fields = _Fields(raw, source)
    heads, hidden, layers = (fields.integer(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    family = ARCHITECTURES[architecture]
    default_dim = {"qwen3": 128, "gemma2": 256}.get(family, hidden // heads)
    bias = bool(raw.get("attention_bias", False))
    shape = ModelShape(
        hidden=hidden,
        intermediate=fields.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", 4 if family == "gemma2" else heads),
        head_dim=fields.integer("head_dim", default_dim),
        vocab=fields.integer("vocab_size"),
        tied=bool(raw.get("tie_word_embeddings", family == "gemma2")),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        qk_norm=family in ("qwen3", "qwen3-moe"),
        output_norms=family == "gemma2",
        windows=_windows(fields, family, layers),
        mla=_mla(fields) if family == "deepseek" else None,
        moe=_moe(fields, family, architecture, layers),
    )
    if shape.heads % shape.kv_heads:
        raise ModelError(f"{source}: num_key_value_heads is {shape.kv_heads}, which does not divide {heads} heads")
    if shape.moe and shape.moe.top_k > shape.moe.experts:
        raise ModelError(f"{source}: num_experts_per_tok is {shape.moe.top_k}, of only {shape.moe.experts} experts")
    return shape


ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3-moe",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "Gemma2ForCausalLM": "gemma2",
}


def shard(shape: ModelShape, ranks: int) -> ModelShape:
    """What one of `ranks` tensor-parallel devices holds: heads, MLP and expert widths, and vocabulary divided.

    Key-value heads are copied where there are fewer than devices; MLA's latent is on every device.

    Raises:
        ModelError: when a width cannot be divided evenly.
    """
    if ranks == 1:
        return shape
    widths = {"heads": shape.heads, "intermediate_size": shape.intermediate, "vocab_size": shape.vocab}
    if shape.moe:
        widths |= {"moe_intermediate_size": shape.moe.intermediate, "shared experts": shape.moe.shared}
    if not shape.mla and shape.kv_heads % ranks and ranks % shape.kv_heads:
        widths["num_key_value_heads"] = shape.kv_heads
    for name, width in widths.items():
        if width % ranks:
            raise ModelError(f"--tp {ranks} does not divide {name} = {width} of {shape.name or 'the model'}")
    moe = shape.moe and replace(
        shape.moe, intermediate=shape.moe.intermediate // ranks, shared=shape.moe.shared // ranks
    )
    return replace(
        shape,
        heads=shape.heads // ranks,
        kv_heads=max(1, shape.kv_heads // ranks),
        intermediate=shape.intermediate // ranks,
        vocab=shape.vocab // ranks,
        moe=moe,
    )


@dataclass(frozen=True)
class _Fields:
    raw: Mapping[str, Any]
    source: str

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.source}: {key} is missing, its cost depends on it")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelError(f"{self.source}: {key} is {value!r}, expected a whole number from {least}")
        return value


def _mla(fields: _Fields) -> MLA:
    return MLA(
        q_lora=fields.integer("q_lora_rank", 0, least=0),
        latent=fields.integer("kv_lora_rank"),
        rope=fields.integer("qk_rope_head_dim"),
        nope=fields.integer("qk_nope_head_dim"),
        value=fields.integer("v_head_dim"),
    )


def _moe(fields: _Fields, family: str, architecture: str, layers: int) -> MoE | None:
    if family == "mixtral":
        counts = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
        return MoE(*counts, fields.integer("intermediate_size"))
    if family == "qwen3-moe":
        if fields.integer("decoder_sparse_step", 1) != 1:
            raise ModelError(f"{fields.source}: decoder_sparse_step is not 1, which is not supported")
        only = fields.raw.get("mlp_only_layers") or []
        if not isinstance(only, list):
            raise ModelError(f"{fields.source}: mlp_only_layers is {only!r}, expected a list of layers")
        dense = sum(layer in only for layer in range(layers))
        experts = fields.integer("num_experts")
    elif family == "deepseek":
        if fields.raw.get("n_routed_experts") is None:
            return None
        if fields.integer("moe_layer_freq", 1) != 1:
            raise ModelError(f"{fields.source}: moe_layer_freq is not 1, which is not supported")
        dense = min(layers, fields.integer("first_k_dense_replace", 0, least=0))
        experts = fields.integer("n_routed_experts")
    else:
        return None
    intermediate = fields.integer("moe_intermediate_size")
    shared = intermediate * fields.integer("n_shared_experts", 0, least=0)
    bias = architecture == "DeepseekV3ForCausalLM"  # e_score_correction_bias
    return MoE(experts, fields.integer("num_experts_per_tok"), intermediate, shared, dense, bias)


def _windows(fields: _Fields, family: str, layers: int) -> tuple[int | None, ...]:
    """As transformers. Mistral and MoE: all layers. Others by `layer_types`; without it, Qwen2 and Qwen3 slide from
    `max_window_layers` on, Gemma 2 in every other layer."""
    raw, always = fields.raw, ("mistral", "mixtral", "gemma2")
    in_use = raw.get("use_sliding_window", False) if family.startswith("qwen") else family in always
    default = None if family == "mixtral" else 4096
    if not in_use or raw.get("sliding_window", default) is None:
        return ()
    window = fields.integer("sliding_window", default)
    if family not in ("qwen2", "qwen3", "gemma2"):
        return (window,) * layers
    types = raw.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if family == "gemma2":
        return tuple(None if layer % 2 else window for layer in range(layers))
    first = fields.integer("max_window_layers", 28, least=0)
    return tuple(window if layer >= first else None for layer in range(layers))
