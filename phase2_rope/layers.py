"""Layers of phase 2: rotary embedding by type, turned and written in one go, and latent attention for DeepSeek."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from phase0_prototype.attention import AttentionBackend
from phase0_prototype.config import ModelConfig
from phase0_prototype.kv_spec import KVSpec
from phase0_prototype.layers import Attention, Layers, RMSNorm
from phase0_prototype.linear import LinearFormat, Part
from phase0_prototype.weights import Destination
from phase2_rope.deepseek import DeepseekConfig, LatentSpec
from phase2_rope.rotary import Rotary, reads_table

LATENT_EPS = 1e-6  # of the norms of latents, whatever rms_norm_eps says: as transformers has it


class RopeAttention(Attention):
    """Phase 0's attention, with `rope` turning queries and keys and writing the cache."""

    rope: ModuleType

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: tuple[Tensor, Tensor],
        plan: Any,
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `Attention`."""
        hq, hkv = self.spec.num_heads, self.spec.num_kv_heads
        qkv = self.qkv(x).view(-1, hq + 2 * hkv, self.spec.head_dim)  # [T, Hq + 2 Hkv, D]
        q, k, v = qkv.split((hq, hkv, hkv), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope.rotate_and_write(q, k, v, rotary, plan.slots, kv)
        if k is None:  # only the cache has it turned
            k = kv[0][plan.slots] if plan.sequences else v  # decodes don't ask for it
        q = q if rows is None else q[rows]
        return self.out(self.backend.run(self.spec, q, k, v, kv, plan))


class UpProjection(nn.Module):
    """`kv_b_proj`: what makes each head's key and value from a latent, [H, P + V, L], kept plain for both forms."""

    def __init__(self, name: str, spec: LatentSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.empty(spec.num_heads, spec.nope + spec.value, spec.latent, dtype=dtype, device=device)

    def destinations(self) -> Mapping[str, Destination]:
        """Where the checkpoint's tensor goes."""
        flat = self.weight.flatten(0, 1)
        return {f"{self.name}.weight": Destination(tuple(flat.shape), flat.copy_)}


class LatentAttention(nn.Module):
    """Multi-head latent attention: projections to and from latents around a backend that attends to them.

    Args:
        spec: its shape.
        down: x to the query's latent (or the query itself) and to L + R numbers of the cache's entry, side by side or
            one after the other.
        q_up: norm and product that make the query from its latent; None where `down` has made it.
        latent_norm: of the L numbers.
        up: keys and values from latents.
        out: the output product.
        backend: `PagedLatentAttention`.
        rope: the module that turns.
    """

    def __init__(
        self,
        spec: LatentSpec,
        down: nn.ModuleList,
        q_up: tuple[RMSNorm, nn.Module] | None,
        latent_norm: RMSNorm,
        up: UpProjection,
        out: nn.Module,
        backend: Any,
        rope: ModuleType,
    ) -> None:
        super().__init__()
        self.spec, self.down, self.latent_norm, self.up, self.out = spec, down, latent_norm, up, out
        self.q_norm: RMSNorm | None = q_up[0] if q_up else None
        self.q_up: nn.Module | None = q_up[1] if q_up else None
        self.backend, self.rope = backend, rope

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: tuple[Tensor, Tensor],
        plan: Any,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden], or [R, hidden] of these rows; writes an entry for each token into `kv[0]`."""
        spec = self.spec
        read = torch.cat([part(x) for part in self.down], dim=-1) if len(self.down) > 1 else self.down[0](x)
        q, entry = read.split((read.shape[-1] - spec.entry, spec.entry), dim=-1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q = q.reshape(-1, spec.num_heads, spec.query)  # [T, H, P + R]
        latent, key = entry.split((spec.latent, spec.rope), dim=-1)
        nope, turning = q.split((spec.nope, spec.rope), dim=-1)
        turned, entry = self.write(turning, self.latent_norm(latent), key, rotary, kv[0], plan)
        if turned is not turning:  # not in place
            q = torch.cat((nope, turned), dim=-1)
        q = q if rows is None else q[rows]
        return self.out(self.backend.run(spec, q, entry, self.up.weight, kv[0], plan))

    def write(
        self, q: Tensor, latent: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: Any
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys, and put latents and keys where they belong.

        Args:
            q: [T, H, R], the part that turns.
            latent: [T, L], normed.
            key: [T, R], the rotary key of all heads.
            rotary: what `Rotary` gives.
            cache: of the layer.
            plan: of this step.

        Returns:
            q turned, and [T, L + R] entries as the backend wants those of the step: decodes don't ask for them.
        """
        spec = self.spec
        if reads_table(rotary):  # one launch turns and writes: the latent goes the way of a value
            both = cache[..., spec.latent :], cache[..., : spec.latent]
            turned, _ = self.rope.rotate_and_write(
                q, key.unsqueeze(1), latent.unsqueeze(1), rotary, plan.slots, both, interleaved=spec.interleaved
            )
            return turned, cache[plan.slots][:, 0] if plan.sequences else latent
        turned, key = self.rope.rotate(q, key.unsqueeze(1), *rotary, interleaved=spec.interleaved)
        entry = torch.cat((latent, key[:, 0]), dim=-1)  # [T, L + R]
        cache.index_put_(plan.slots, entry.unsqueeze(1))
        return turned, entry


class RopeLayers(Layers):
    """See `Layers`.

    Args:
        rope: the module that turns: `rotate` and `rotate_and_write`.
        mla: the module with `PagedLatentAttention`.
        gathered: the model that these are for may turn q and k by itself, and wants cosines and sines.
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
        gathered: bool = False,
    ) -> None:
        self.rope, self.gathered = rope, gathered
        self.latent_backend = mla.PagedLatentAttention() if isinstance(config, DeepseekConfig) else None
        super().__init__(config, dtype, device, self.latent_backend or backend, max_model_len, number_format)

    def rotary(self) -> Rotary:
        """Cosines and sines by the config's rope type."""
        c = self.config
        width = c.latent.rope if isinstance(c, DeepseekConfig) else c.head_dim
        return Rotary(
            c.rope,
            width,
            self.max_model_len,
            self.dtype,
            self.device,
            context=c.max_position_embeddings,
            gathered=self.gathered,
        )

    def kv_spec(self) -> KVSpec:
        """Keys and values, or one entry of latent and rotary key."""
        c = self.config
        if isinstance(c, DeepseekConfig):
            return KVSpec(c.num_layers, 1, c.latent.entry, self.dtype, value_dim=0)
        return super().kv_spec()

    def ignores(self, name: str) -> bool:
        """Also the layers behind the last, which predict further tokens."""
        c = self.config
        mtp = range(c.num_layers, c.num_layers + c.mtp_layers) if isinstance(c, DeepseekConfig) else range(0)
        return super().ignores(name) or any(name.startswith(f"model.layers.{layer}.") for layer in mtp)

    def attention(self, name: str, layer: int) -> nn.Module:
        """The attention block of one layer; raises ValueError where the backend can't serve it."""
        c = self.config
        if isinstance(c, DeepseekConfig):
            return self._latent(name, c)
        plain = super().attention(name, layer)
        assert isinstance(plain, Attention)
        norms = (plain.q_norm, plain.k_norm) if plain.q_norm is not None and plain.k_norm is not None else None
        turning = RopeAttention(plain.spec, plain.qkv, plain.out, self.backend, norms)
        turning.rope = self.rope
        return turning

    def _latent(self, name: str, c: DeepseekConfig) -> LatentAttention:
        spec, hidden, bias = c.latent, c.hidden_size, c.attention_bias
        entry = Part(f"{name}.kv_a_proj_with_mqa", spec.entry)
        queries = spec.num_heads * spec.query
        if c.q_lora_rank is None:
            first, first_bias, q_up = Part(f"{name}.q_proj", queries), False, None
        else:
            first, first_bias = Part(f"{name}.q_a_proj", c.q_lora_rank), bias
            to_heads = (Part(f"{name}.q_b_proj", queries),)
            q_up = (
                self._latent_norm(f"{name}.q_a_layernorm", c.q_lora_rank),
                self.linear(f"{name}.q_b_proj", to_heads, c.q_lora_rank),
            )
        stacked = ((first, entry),) if first_bias == bias else ((first,), (entry,))  # one product where biases agree
        down = [
            self.linear(f"{name}.down{i}", parts, hidden, bias=first_bias if parts[0] is first else bias)
            for i, parts in enumerate(stacked)
        ]
        return LatentAttention(
            spec,
            nn.ModuleList(down),
            q_up,
            self._latent_norm(f"{name}.kv_a_layernorm", spec.latent),
            UpProjection(f"{name}.kv_b_proj", spec, self.dtype, self.device),
            self.linear(
                f"{name}.o_proj", (Part(f"{name}.o_proj", hidden),), spec.num_heads * spec.value, bias=c.o_bias
            ),
            self.backend,
            self.rope,
        )

    def _latent_norm(self, name: str, size: int) -> RMSNorm:
        return RMSNorm(name, size, LATENT_EPS, self.dtype, self.device)
