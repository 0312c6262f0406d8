"""What the engine needs to know of a model, read from a Hugging Face config.json.

Defaults are those of the config classes of `transformers`: published files leave out what equals the default.
The five sizes have no default here, for a model is never meant to have been sized by accident.
An architecture is a function from the file's fields to a ModelConfig. A later phase supports another one by passing
`architectures=ARCHITECTURES | {"NewForCausalLM": new}`; the function may return a subclass of ModelConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phase0_prototype.config_fields import Fields, read_json
from phase0_prototype.errors import ConfigError

DTYPES = ("bfloat16", "float16", "float32", "float64")
ACTIVATION_NAMES = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}
"""Of ModelConfig -> in files."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base wavelength, type, and the type's own parameters (`factor`, `low_freq_factor`, ...).

    Which types exist is known by the code that builds the tables, not here.
    """

    rope_type: str
    theta: float
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model: sizes, and the few choices in which architectures differ.

    Those with a default are none of Llama's, Mistral's, Qwen2's and Qwen3's: a later phase's architecture sets them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before RoPE
    sliding_windows: tuple[int | None, ...]  # per layer: how many positions a token sees, itself included; None = all
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # generation ends at any of them
    dtype: str | None  # what the weights are stored in; None where the file does not say
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)  # `quantization_config`, as it stands
    activation: str = "silu"  # of the MLP's gate: a name of layers.py's ACTIVATIONS
    offset_norms: bool = False  # norms multiply by 1 + weight, and in float32
    output_norms: bool = False  # what attention and MLP add to the residual stream is normed too
    embedding_scale: float | None = None  # embeddings are multiplied by it
    score_scale: float | None = None  # attention scores are multiplied by it; None: by head_dim ** -0.5
    score_cap: float | None = None  # scores become cap * tanh(score / cap)
    logit_cap: float | None = None  # so do logits

    @property
    def longest(self) -> int:
        """Positions that the model may be asked for: those it was trained on, times what a scaling stretches them.

        As in vLLM: `linear` and `dynamic` multiply `max_position_embeddings` by their factor, `yarn` the original
        context; files of the other types name the stretched length themselves.
        """
        factor, trained = self.rope.parameters.get("factor"), self.max_position_embeddings
        if self.rope.rope_type not in ("linear", "dynamic", "yarn") or not isinstance(factor, int | float):
            return trained
        if self.rope.rope_type == "yarn":
            original = self.rope.parameters.get("original_max_position_embeddings")
            return max(trained, int((original if isinstance(original, int) else trained) * factor))
        return max(trained, int(trained * factor))


Architecture = Callable[[Fields], ModelConfig]


def load_config(path: Path, *, architectures: Mapping[str, Architecture] | None = None) -> ModelConfig:
    """Read a config.json, or the directory that holds one together with its generation_config.json.

    Raises ConfigError (one line: file, key, value, what is supported).
    """
    file = path / "config.json" if path.is_dir() else path
    generation = file.parent / "generation_config.json"
    return parse_config(
        read_json(file),
        generation=read_json(generation) if generation.exists() else None,
        source=str(file),
        architectures=architectures,
    )


def parse_config(
    raw: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    source: str = "config.json",
    architectures: Mapping[str, Architecture] | None = None,
) -> ModelConfig:
    """Turn the content of config.json into a ModelConfig; `source` names it in errors.

    End tokens are those of `generation` (generation_config.json) where it has any, as in `transformers`: chat models
    list more there than config.json does. Raises ConfigError.
    """
    known = ARCHITECTURES if architectures is None else architectures
    if generation is not None and generation.get("eos_token_id") is not None:
        eos = list(Fields(generation, _sibling(source)).token_ids("eos_token_id"))
        raw = {**raw, "eos_token_id": eos}
    fields = Fields(raw, source)
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        fields.fail("architectures", f"a list with one of {', '.join(known)}")
    return known[names[0]](fields)


def llama(fields: Fields) -> ModelConfig:
    """Llama 1 to 3.x, TinyLlama, and what follows their layout. `attention_bias` covers q, k, v and o."""
    bias = fields.boolean("attention_bias", False)
    return decoder(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        default_max_positions=2048,
        default_bos=1,
        default_eos=2,
    )


def mistral(fields: Fields) -> ModelConfig:
    """Mistral 7B and Nemo. Every layer has the sliding window; v0.2 and later set it to null."""
    window = fields.integer_or_none("sliding_window", 4096)
    return decoder(
        fields,
        sliding_windows=(window,) * fields.integer("num_hidden_layers"),
        default_kv_heads=8,
        default_max_positions=131072,
        default_bos=1,
        default_eos=2,
    )


def qwen2(fields: Fields) -> ModelConfig:
    """Qwen2 and Qwen2.5: bias on q, k and v, none on o."""
    return decoder(
        fields, qkv_bias=True, sliding_windows=_qwen_windows(fields), default_kv_heads=32, default_max_positions=32768
    )


def qwen3(fields: Fields) -> ModelConfig:
    """Qwen3 (dense): norms on q and k; heads are 128 wide whatever the hidden size."""
    bias = fields.boolean("attention_bias", False)
    return decoder(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        sliding_windows=_qwen_windows(fields),
        default_kv_heads=32,
        default_head_dim=128,
        default_max_positions=32768,
    )


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": llama,
        "MistralForCausalLM": mistral,
        "Qwen2ForCausalLM": qwen2,
        "Qwen3ForCausalLM": qwen3,
    }
)


def decoder(
    fields: Fields,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    activation: str = "silu",
    activation_key: str = "hidden_act",
    sliding_windows: tuple[int | None, ...] | None = None,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    default_tied: bool = False,
    default_max_positions: int,
    default_bos: int | None = None,
    default_eos: int | None = None,
) -> ModelConfig:
    """Read the keys that all architectures share; the arguments are where they differ. Raises ConfigError."""
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer_or_none("num_key_value_heads", default_kv_heads) or heads
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    head_dim = fields.integer_or_none("head_dim", default_head_dim)
    if head_dim is None:
        if hidden % heads:
            fields.fail("hidden_size", f"a multiple of num_attention_heads = {heads}, or head_dim given")
        head_dim = hidden // heads
    if head_dim % 2:
        raise ConfigError(f"{fields.source}: head_dim is {head_dim}: expected an even number, RoPE rotates pairs")
    names = ACTIVATION_NAMES[activation]
    if fields.raw.get(activation_key, names[0]) not in names:
        fields.fail(activation_key, f"{names[0]}, the only activation that is supported")
    max_positions = fields.integer("max_position_embeddings", default_max_positions)
    return ModelConfig(
        architecture=fields.raw["architectures"][0],
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=read_rope(fields, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default_tied),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_windows=sliding_windows or (None,) * layers,
        bos_token_id=fields.integer_or_none("bos_token_id", default_bos, minimum=0),
        eos_token_ids=fields.token_ids("eos_token_id", default_eos),
        dtype=_dtype(fields),
        quantization=fields.mapping("quantization_config"),
        activation=activation,
    )


def read_rope(fields: Fields, max_positions: int) -> RopeConfig:
    """RoPE from `rope_parameters`, or from `rope_theta` and `rope_scaling` as files before 2026 spell it.

    The precedence and the fallback for `original_max_position_embeddings` are those of `transformers`
    (modeling_rope_utils.py, `convert_rope_params_to_dict`).
    """
    key = "rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters"
    parameters = dict(fields.mapping(key) or {})
    old_name = parameters.pop("type", "default")
    rope_type = parameters.pop("rope_type", old_name)
    theta = parameters.pop("rope_theta", fields.raw.get("rope_theta", 10000.0))
    if not isinstance(rope_type, str):
        fields.fail(key, "rope_type to be a string")
    if any(not _is_rope_value(value) for value in parameters.values()):
        fields.fail(key, "numbers and lists of numbers, the same for all layers")
    if "partial_rotary_factor" in fields.raw:
        parameters.setdefault("partial_rotary_factor", fields.number("partial_rotary_factor"))
    if rope_type in ("llama3", "yarn", "longrope"):
        if "original_max_position_embeddings" in fields.raw:
            parameters["original_max_position_embeddings"] = fields.integer("original_max_position_embeddings")
        parameters.setdefault("original_max_position_embeddings", max_positions)
    theta = Fields({"rope_theta": theta}, fields.source).number("rope_theta")
    return RopeConfig(rope_type, theta, MappingProxyType(parameters))


def _qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, unless `layer_types` says it layer by layer."""
    layers = fields.integer("num_hidden_layers")
    window = None
    if fields.boolean("use_sliding_window", False):
        window = fields.integer_or_none("sliding_window", 4096)
    types = fields.raw.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    return windows_by_type(fields, types, window, "a window with use_sliding_window = true")


def windows_by_type(fields: Fields, types: Any, window: int | None, needed: str = "a window") -> tuple[int | None, ...]:
    """The window of each layer from its type; `needed` is what a sliding layer asks for. Raises ConfigError."""
    layers, known = fields.integer("num_hidden_layers"), ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        fields.fail("layer_types", f"{layers} entries, each {' or '.join(known)}")
    if "sliding_attention" in types and window is None:
        fields.fail("sliding_window", f"{needed}, as layer_types has sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _dtype(fields: Fields) -> str | None:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    value = fields.raw.get(key)
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        fields.fail(key, " or ".join(DTYPES))
    return name


def _is_rope_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, int | float) for item in value)
    return value is None or isinstance(value, int | float)  # bool is an int: YaRN's `truncate`


def _sibling(source: str) -> str:
    return str(Path(source).with_name("generation_config.json"))
