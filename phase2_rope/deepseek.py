"""DeepSeek-V2 and V3 as configs: what multi-head latent attention needs beside the sizes of any decoder.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1, and the configs of `transformers` (deepseek_v2, deepseek_v3). Here
all layers have a dense MLP: experts arrive in phase 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from phase0_prototype.config import ARCHITECTURES as DENSE
from phase0_prototype.config import Architecture, ModelConfig, RopeConfig, decoder
from phase0_prototype.config_fields import Fields
from phase0_prototype.errors import ConfigError
from phase2_rope.scaling import mscale


@dataclass(frozen=True)
class LatentSpec:
    """The shape of one layer's latent attention. H heads share one latent of L numbers and one rotary key of R.

    Attributes:
        num_heads: H.
        latent: L, numbers that keys and values of all heads are made from.
        rope: R, numbers of a query and of the shared key that carry the position.
        nope: P, numbers of a query that do not.
        value: V, numbers of a head's value.
        scale: of the scores: (P + R)^-0.5, times YaRN's m².
        interleaved: whether neighbours turn as pairs (GPT-J) or halves (neox).
    """

    num_heads: int
    latent: int
    rope: int
    nope: int
    value: int
    scale: float
    interleaved: bool = True

    @property
    def entry(self) -> int:
        """Numbers that a token leaves in the cache of a layer."""
        return self.latent + self.rope

    @property
    def query(self) -> int:
        """Numbers in a head's query."""
        return self.nope + self.rope


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(ModelConfig):
    """A model with latent attention. `head_dim` is P + R.

    Attributes:
        latent: shape of its attention, the same in all layers.
        q_lora_rank: width of the queries' own latent; None: they are projected in one step.
        attention_bias: whether the products that read the hidden state, and the output, have a bias.
        mtp_layers: layers behind the last that predict further tokens; the checkpoint has them, phase 7 runs them.
    """

    latent: LatentSpec
    q_lora_rank: int | None
    attention_bias: bool
    mtp_layers: int


def deepseek_v2(fields: Fields) -> DeepseekConfig:
    """DeepSeek-V2 and V2-Lite (no q LoRA), with dense layers only."""
    return _deepseek(fields, interleaved=True, mlp_bias=fields.boolean("mlp_bias", False), ids=(1, 2), positions=2048)


def deepseek_v3(fields: Fields) -> DeepseekConfig:
    """DeepSeek-V3 and R1, with dense layers only."""
    interleaved = fields.raw.get("rope_interleave") is None or fields.boolean("rope_interleave", True)
    return _deepseek(fields, interleaved=interleaved, mlp_bias=False, ids=(0, 1), positions=4096, mtp=1)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {**DENSE, "DeepseekV2ForCausalLM": deepseek_v2, "DeepseekV3ForCausalLM": deepseek_v3}
)


def score_scale(rope: RopeConfig, width: int) -> float:
    """width^-0.5, times the square of YaRN's m = 0.1 · mscale_all_dim · ln(factor) + 1 where the config has both.

    YaRN (arXiv 2309.00071) wants the scores larger by m². It may do so through cos and sin, which turn all numbers of a
    head; here only R of P + R turn, so the scale must carry it.

    Raises:
        ConfigError: `mscale_all_dim` without a factor.
    """
    weight = rope.parameters.get("mscale_all_dim") or 0
    if rope.rope_type == "default" or not weight:
        return width**-0.5
    factor = rope.parameters.get("factor")
    if not isinstance(factor, int | float):
        raise ConfigError(f"rope_parameters has mscale_all_dim = {weight} and factor = {factor!r}: it needs a number")
    return float(width**-0.5 * mscale(factor, weight) ** 2)


def _deepseek(
    fields: Fields, *, interleaved: bool, mlp_bias: bool, ids: tuple[int, int], positions: int, mtp: int = 0
) -> DeepseekConfig:
    layers = fields.integer("num_hidden_layers")
    dense = fields.integer_or_none("first_k_dense_replace", 0, minimum=0) or 0
    if fields.raw.get("n_routed_experts") is not None and dense < layers:
        fields.fail("first_k_dense_replace", f"all {layers} layers: the others have experts, which phase 6 brings")
    rope, nope = fields.integer("qk_rope_head_dim"), fields.integer("qk_nope_head_dim")
    if rope % 2:
        fields.fail("qk_rope_head_dim", "an even number, RoPE rotates pairs")
    bias = fields.boolean("attention_bias", False)
    base = decoder(
        Fields({**fields.raw, "head_dim": nope + rope, "num_key_value_heads": None}, fields.source),
        o_bias=bias,
        mlp_bias=mlp_bias,
        default_max_positions=positions,
        default_bos=ids[0],
        default_eos=ids[1],
    )
    latent = LatentSpec(
        base.num_heads,
        fields.integer("kv_lora_rank"),
        rope,
        nope,
        fields.integer("v_head_dim"),
        score_scale(base.rope, nope + rope),
        interleaved,
    )
    return DeepseekConfig(
        **{field.name: getattr(base, field.name) for field in dataclasses.fields(base)},
        latent=latent,
        q_lora_rank=fields.integer_or_none("q_lora_rank", 1536),
        attention_bias=bias,
        mtp_layers=fields.integer_or_none("num_nextn_predict_layers", mtp, minimum=0) or 0,
    )
