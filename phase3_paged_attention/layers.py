"""Layers of phase 3: phase 2's, and attention that keeps its keys and values, or its latents, in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from phase0_prototype.attention import AttentionBackend, AttentionSpec
from phase0_prototype.config import ModelConfig
from phase0_prototype.errors import UserError
from phase0_prototype.kv_spec import KVPart, KVSpec
from phase0_prototype.layers import Attention
from phase0_prototype.linear import LinearFormat
from phase0_prototype.weights import Destination
from phase2_rope.deepseek import DeepseekConfig
from phase2_rope.layers import LatentAttention, RopeLayers
from phase3_paged_attention.kv_format import FORMATS, KVFormat, checked_scale
from phase3_paged_attention.latent_format import PACKED, PackedLatents
from phase3_paged_attention.packed_latents import PackedLatentAttention

SCALE_NAMES = ("{layer}.{side}_scale", "{layer}.{side}_proj.{side}_scale", "{layer}.attn.{side}_scale")


class QuantisedAttention(Attention):
    """Attention whose new keys and values enter the cache in 8 bits. The backend reads them there, a prompt's own ones
    too: so a token sees the same keys whether its prompt came in one piece, in chunks, or was computed again.

    Args:
        name: of the block in the checkpoint.
        plain: the block to take projections, norms and backend from.
        quantise: the module that turns, quantises and writes.
        kv_format: of the cache.

    Attributes:
        scales: of the layer's keys and values, float32 [1] each; None where the cache has one for each key and value.
        known: sides, k and v, whose scale was given by somebody; those of the others are 1.
    """

    def __init__(self, name: str, plain: Attention, quantise: ModuleType, kv_format: KVFormat, device: torch.device):
        norms = (plain.q_norm, plain.k_norm) if plain.q_norm is not None and plain.k_norm is not None else None
        super().__init__(plain.spec, plain.qkv, plain.out, plain.backend, norms)
        self.name, self.quantise, self.kv_format = name, quantise, kv_format
        self.scales = None if kv_format.per_token else tuple(torch.ones(1, device=device) for _ in "kv")
        self.known: set[str] = set()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: tuple[Tensor, ...],
        plan: Any,
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Attention`; `kv` are keys, values and, for scales by token, those of both."""
        hq, hkv = self.spec.num_heads, self.spec.num_kv_heads
        qkv = self.qkv(x).view(-1, hq + 2 * hkv, self.spec.head_dim)  # [T, Hq + 2 Hkv, D]
        q, k, v = qkv.split((hq, hkv, hkv), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        quantised: Any = kv if self.scales is None else (*kv, *self.scales)
        q = self.quantise.rotate_quantise_write(q, k, v, *rotary, plan.slots, quantised)
        q = q if rows is None else q[rows]
        return self.out(self.backend.run(self.spec, q, k, v, quantised, plan))

    def destinations(self) -> Mapping[str, Destination]:
        """Where the checkpoint's scales go, if it has some, by the names that vLLM knows."""
        if self.scales is None:
            return {}
        return {
            name: Destination((1,), partial(self._load, side, name), optional=True)
            for side in "kv"
            for name in (spelled.format(layer=self.name, side=side) for spelled in SCALE_NAMES)
        }

    def set_scale(self, side: str, value: float) -> None:
        """Take the scale of this side, k or v."""
        assert self.scales is not None
        self.scales["kv".index(side)].fill_(value)
        self.known.add(side)

    def _load(self, side: str, name: str, stored: Tensor) -> None:
        self.set_scale(side, checked_scale(float(stored), f"the checkpoint's {name}"))


class PagedLayers(RopeLayers):
    """See `RopeLayers`.

    Args:
        quantise: the module that turns, quantises and writes: `rotate_quantise_write`.
        kv_cache_dtype: auto, a name of `FORMATS`, or for latents `PACKED`.

    Raises:
        UserError: the model's cache can't be kept so.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        backend: AttentionBackend,
        max_model_len: int,
        number_format: LinearFormat | None = None,
        *,
        rope: ModuleType,
        mla: ModuleType,
        quantise: ModuleType,
        kv_cache_dtype: str = "auto",
        gathered: bool = False,
    ) -> None:
        self.quantise, self.kv_cache_dtype = quantise, kv_cache_dtype
        self.kv_format, self.packed = None, None
        if isinstance(config, DeepseekConfig):
            self.packed = _packed(config, dtype, kv_cache_dtype)
        elif kv_cache_dtype == PACKED:
            raise UserError(f"kv_cache_dtype={PACKED!r} is for latents: give fp8_e4m3 or fp8_per_token_head")
        else:
            self.kv_format = FORMATS.get(kv_cache_dtype)
        super().__init__(
            config, dtype, device, backend, max_model_len, number_format, rope=rope, mla=mla, gathered=gathered
        )

    def kv_spec(self) -> KVSpec:
        """Keys and values as the format has them, and scales where each has its own; or packed latents."""
        spec, kept = super().kv_spec(), self.kv_format
        if self.packed is not None:
            return replace(spec, kept=(KVPart((1, self.packed.entry_bytes), torch.uint8), KVPart((1, 0), torch.uint8)))
        if kept is None:
            return spec
        sides = (KVPart((spec.num_kv_heads, spec.head_dim), kept.dtype),) * 2
        scales = (KVPart((spec.num_kv_heads,), torch.float32),) * 2 if kept.per_token else ()
        return replace(spec, kept=(*sides, *scales))

    def attention_spec(self, layer: int) -> AttentionSpec:
        """What one layer asks of the backend."""
        name = PACKED if self.packed is not None else "auto" if self.kv_format is None else self.kv_format.name
        return replace(super().attention_spec(layer), kv_cache_dtype=name)

    def attention(self, name: str, layer: int) -> nn.Module:
        """The attention block of one layer; raises ValueError where the backend can't serve it."""
        plain = super().attention(name, layer)
        if self.packed is not None and isinstance(plain, LatentAttention):
            return PackedLatentAttention(plain, self.packed)
        if self.kv_format is not None and isinstance(plain, Attention):
            return QuantisedAttention(name, plain, self.quantise, self.kv_format, self.device)
        return plain

    def ignores(self, name: str) -> bool:
        """Also scales of a cache that is not kept so."""
        return super().ignores(name) or name.endswith((".k_scale", ".v_scale"))


def _packed(config: DeepseekConfig, dtype: torch.dtype, kv_cache_dtype: str) -> PackedLatents | None:
    """How latents are packed; None: they are not."""
    if kv_cache_dtype == "auto":
        return None
    if kv_cache_dtype not in ("fp8", PACKED):
        raise UserError(
            f"kv_cache_dtype={kv_cache_dtype!r} is for keys and values, this model has latents: give {PACKED}"
        )
    try:
        return PackedLatents(config.latent.latent, config.latent.rope, dtype)
    except ValueError as error:
        raise UserError(f"kv_cache_dtype={kv_cache_dtype!r}: {error}") from None
