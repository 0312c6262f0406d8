"""`Layers` builds every piece of a model. A phase overrides the one method that it improves.

The chain Layers -> RopeLayers -> PagedLayers -> QuantLayers -> ParallelLayers reads as the table of contents of the
course; the model itself (model.py) is described once and never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phase0_prototype.attention import AttentionBackend, AttentionPlan, AttentionSpec, write_kv
from phase0_prototype.config import ModelConfig
from phase0_prototype.kv_spec import KVSpec
from phase0_prototype.linear import Linear, LinearFormat, Part, best_format, dense_product
from phase0_prototype.rotary import RotaryTable, apply_rope
from phase0_prototype.weights import Destination


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang & Sennrich, 2019, arXiv 1910.07467)."""

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.weight = torch.ones(size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def destinations(self) -> Mapping[str, Destination]:
        """Where the checkpoint's tensor goes."""
        return {f"{self.name}.weight": Destination(tuple(self.weight.shape), self.weight.copy_)}


class OffsetNorm(RMSNorm):
    """x / rms(x) * (1 + weight): the weight is stored as its distance from one, and all of it is done in float32."""

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(name, size, eps, torch.float32, device)  # 1 + weight would lose the weight's bits in bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> same."""
        return super().forward(x.float()).to(x.dtype)

    def destinations(self) -> Mapping[str, Destination]:
        """Where the checkpoint's tensor goes."""
        return {f"{self.name}.weight": Destination(tuple(self.weight.shape), self._load)}

    def _load(self, stored: Tensor) -> None:
        self.weight.copy_(stored).add_(1)


class Embedding(nn.Module):
    """Token embedding, [V, hidden]; also the output matrix of models with tied weights."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden]."""
        return F.embedding(token_ids, self.weight)

    def as_head(self, x: Tensor) -> Tensor:
        """[R, hidden] -> logits [R, V]."""
        return dense_product(x, self.weight)

    def destinations(self) -> Mapping[str, Destination]:
        """Where the checkpoint's tensor goes."""
        return {f"{self.name}.weight": Destination(tuple(self.weight.shape), self.weight.copy_)}


class ScaledEmbedding(Embedding):
    """Embeddings are multiplied by `scale`, which the model's dtype rounds; as an output matrix they are not."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, scale: float
    ) -> None:
        super().__init__(name, vocab_size, hidden_size, dtype, device)
        self.scale = float(torch.tensor(scale, dtype=dtype))

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden]."""
        return super().forward(token_ids) * self.scale


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up as one product (Shazeer, 2020, arXiv 2002.05202)."""

    def __init__(
        self, gate_up: nn.Module, down: nn.Module, activation: Callable[[Tensor], Tensor] = ACTIVATIONS["silu"]
    ) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Attention(nn.Module):
    """Projections around a backend; grouped query attention, with optional normalisation of q and k (Qwen3)."""

    def __init__(
        self,
        spec: AttentionSpec,
        qkv: nn.Module,
        out: nn.Module,
        backend: AttentionBackend,
        norms: tuple[RMSNorm, RMSNorm] | None,
    ) -> None:
        super().__init__()
        self.spec, self.qkv, self.out, self.backend = spec, qkv, out, backend
        self.q_norm: RMSNorm | None = norms[0] if norms else None
        self.k_norm: RMSNorm | None = norms[1] if norms else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden], or [R, hidden] of these rows, which `plan` is for; writes the layer's keys and
        values, of all rows, into `kv`."""
        hq, hkv = self.spec.num_heads, self.spec.num_kv_heads
        qkv = self.qkv(x).view(-1, hq + 2 * hkv, self.spec.head_dim)  # [T, Hq + 2 Hkv, D]
        v = qkv[:, hq + hkv :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qkv[:, :hq]), self.k_norm(qkv[:, hq : hq + hkv])), dim=1)
        else:
            qk = qkv[:, : hq + hkv]
        qk = apply_rope(qk, *rotary)  # q and k in one go: half the operations
        q = qk[:, :hq] if rows is None else qk[rows, :hq]
        write_kv(*kv, plan.slots, qk[:, hq:], v)
        return self.out(self.backend.run(self.spec, q, qk[:, hq:], v, kv, plan))


class Layers:
    """Builds the pieces of a model for one device and dtype.

    Args:
        config: the model.
        dtype: of weights and activations.
        device: where the weights lie.
        backend: attention for every layer.
        max_model_len: positions that the rotary table covers.
        number_format: how linear weights are kept; by default the fastest for the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        backend: AttentionBackend,
        max_model_len: int,
        number_format: LinearFormat | None = None,
    ) -> None:
        self.config, self.dtype, self.device, self.backend = config, dtype, device, backend
        self.max_model_len = max_model_len
        self.number_format = number_format or best_format(device, dtype)

    def linear(self, name: str, parts: tuple[Part, ...], in_features: int, *, bias: bool = False) -> nn.Module:
        """A linear layer; `name` is its place in the model, `parts` its matrices in the checkpoint."""
        return Linear(
            parts, in_features, bias=bias, number_format=self.number_format, dtype=self.dtype, device=self.device
        )

    def norm(self, name: str, size: int) -> RMSNorm:
        """Root-mean-square normalisation over the last `size` numbers."""
        kind = OffsetNorm if self.config.offset_norms else RMSNorm
        return kind(name, size, self.config.rms_norm_eps, self.dtype, self.device)

    def embedding(self, name: str) -> Embedding:
        """The token embedding."""
        c = self.config
        if c.embedding_scale is None:
            return Embedding(name, c.vocab_size, c.hidden_size, self.dtype, self.device)
        return ScaledEmbedding(name, c.vocab_size, c.hidden_size, self.dtype, self.device, c.embedding_scale)

    def rotary(self) -> nn.Module:
        """The table that all layers share."""
        config = self.config
        return RotaryTable(config.rope, config.head_dim, self.max_model_len, self.dtype, self.device)

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to something that the engine doesn't run."""
        return name.endswith("rotary_emb.inv_freq")

    def kv_spec(self) -> KVSpec:
        """What a token leaves in the cache."""
        return KVSpec(self.config.num_layers, self.config.num_kv_heads, self.config.head_dim, self.dtype)

    def mlp(self, name: str) -> nn.Module:
        """The feed-forward block."""
        c = self.config
        gate_up = (Part(f"{name}.gate_proj", c.intermediate_size), Part(f"{name}.up_proj", c.intermediate_size))
        return MLP(
            self.linear(f"{name}.gate_up_proj", gate_up, c.hidden_size, bias=c.mlp_bias),
            self.to_stream(f"{name}.down_proj", c.intermediate_size, "post_feedforward_layernorm", bias=c.mlp_bias),
            ACTIVATIONS[c.activation],
        )

    def to_stream(self, name: str, in_features: int, norm: str, *, bias: bool) -> nn.Module:
        """The product that ends a block, and the norm of its result where the model has one before it is added."""
        hidden = self.config.hidden_size
        product = self.linear(name, (Part(name, hidden),), in_features, bias=bias)
        if not self.config.output_norms:
            return product
        layer = name.rsplit(".", 2)[0]  # model.layers.0 of model.layers.0.mlp.down_proj
        return nn.Sequential(product, self.norm(f"{layer}.{norm}", hidden))

    def attention_spec(self, layer: int) -> AttentionSpec:
        """What one layer asks of the backend."""
        c = self.config
        scale = c.head_dim**-0.5 if c.score_scale is None else c.score_scale
        window = c.sliding_windows[layer]
        return AttentionSpec(c.num_heads, c.num_kv_heads, c.head_dim, scale, window, c.score_cap, self.dtype)

    def attention(self, name: str, layer: int) -> nn.Module:
        """The attention block of one layer.

        Raises:
            ValueError: the backend can't serve this layer, with its reasons.
        """
        c = self.config
        spec = self.attention_spec(layer)
        if reasons := self.backend.why_not(spec, self.device):
            raise ValueError(f"{type(self.backend).__name__} can't run {name}: {'; '.join(reasons)}")
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = (Part(f"{name}.q_proj", q), Part(f"{name}.k_proj", kv), Part(f"{name}.v_proj", kv))
        norms = (
            (self.norm(f"{name}.q_norm", c.head_dim), self.norm(f"{name}.k_norm", c.head_dim)) if c.qk_norm else None
        )
        return Attention(
            spec,
            self.linear(f"{name}.qkv_proj", qkv, c.hidden_size, bias=c.qkv_bias),
            self.to_stream(f"{name}.o_proj", q, "post_attention_layernorm", bias=c.o_bias),
            self.backend,
            norms,
        )

    def head(self, name: str, embedding: Embedding) -> nn.Module | None:
        """The output matrix, or None when it is the embedding."""
        if self.config.tie_word_embeddings:
            return None
        return self.linear(name, (Part(name, self.config.vocab_size),), self.config.hidden_size)
