"""The decoder, described once: architectures differ in flags of the config only.

`model(batch, kv)` is the whole interface: a flat batch in, logits of the wanted rows out, keys and values written into
the cache on the way. What each piece is made of is the business of `Layers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from module0_profiling.ranges import span
from phase0_prototype.attention import AttentionPlan
from phase0_prototype.batch import Batch
from phase0_prototype.config import ModelConfig
from phase0_prototype.kv_cache import KVCache
from phase0_prototype.layers import Layers
from phase0_prototype.weights import Destination


@runtime_checkable
class Loadable(Protocol):
    """A module that takes tensors of the checkpoint."""

    def destinations(self) -> Mapping[str, Destination]:
        """Where each tensor goes, by its name in the checkpoint."""
        ...


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, layers: Layers, index: int) -> None:
        super().__init__()
        name, hidden = f"model.layers.{index}", layers.config.hidden_size
        self.input_norm = layers.norm(f"{name}.input_layernorm", hidden)
        self.attention = layers.attention(f"{name}.self_attn", index)
        before_mlp = "pre_feedforward_layernorm" if layers.config.output_norms else "post_attention_layernorm"
        self.mlp_norm = layers.norm(f"{name}.{before_mlp}", hidden)
        self.mlp = layers.mlp(f"{name}.mlp")

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[T, hidden] -> [T, hidden]; with `rows`, only those: [R, hidden]. Keys and values are written for all."""
        with span("norm"):
            normed = self.input_norm(x)
        with span("attention"):
            attended = self.attention(normed, rotary, kv, plan, rows)
            x = (x if rows is None else x[rows]) + attended
        with span("norm"):
            normed = self.mlp_norm(x)
        with span("mlp"):
            return x + self.mlp(normed)


class DecoderModel(nn.Module):
    """A decoder-only Transformer.

    Args:
        config: its shape.
        layers: builds its pieces.
    """

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = layers.embedding("model.embed_tokens")
        self.layers = nn.ModuleList(DecoderLayer(layers, i) for i in range(config.num_layers))
        self.norm = layers.norm("model.norm", config.hidden_size)
        self.lm_head = layers.head("lm_head", self.embed_tokens)
        self.rotary: Any = layers.rotary()
        self.backend = layers.backend
        self.windows = frozenset(config.sliding_windows)
        self.kv_spec, self.dtype = layers.kv_spec(), layers.dtype
        self._ignores = layers.ignores

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Logits [R, V] of the batch's `logits_rows`, in the model's dtype."""
        plan = self.backend.plan(batch, self.windows, kv.block_size)
        last = self._last_layer(batch, plan, kv) if batch.last and batch.num_tokens > len(batch.last) else None
        return self.compute(batch.token_ids, self.rotary.places(batch), batch.logits_rows, plan, kv, last)

    def _last_layer(self, batch: Batch, plan: AttentionPlan, kv: KVCache) -> AttentionPlan | None:
        """A plan of the last tokens that are wanted: nothing else of the last layer's output is used. It writes keys
        and values of all. None where they can't be attended to in one call."""
        found = self.backend.plan(batch.last_tokens(), self.windows, kv.block_size)
        return None if found.sequences else replace(found, slots=plan.slots)

    def compute(
        self,
        token_ids: Tensor,
        places: Tensor,
        logits_rows: Tensor,
        plan: AttentionPlan,
        kv: KVCache,
        last: AttentionPlan | None = None,
    ) -> Tensor:
        """The part of `forward` that is only arithmetic: what is compiled or captured.

        `places` is what the rotary table makes of the positions. With `last`, the last layer computes `logits_rows`
        only.
        """
        with span("embedding"):
            x = self.embed_tokens(token_ids)  # [T, hidden]
            rotary = self.rotary(places)
        for i, layer in enumerate(self.layers):
            if last is not None and i == len(self.layers) - 1:
                x = layer(x, rotary, kv.layer(i), last, logits_rows)  # [R, hidden]
            else:
                x = layer(x, rotary, kv.layer(i), plan)
        with span("norm"):
            x = self.norm(x if last is not None else x[logits_rows])  # [R, hidden]
        with span("lm_head"):
            logits: Tensor = self.embed_tokens.as_head(x) if self.lm_head is None else self.lm_head(x)
            cap = self.config.logit_cap
            return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def destinations(self) -> dict[str, Destination]:
        """Where every tensor of the checkpoint goes, by its name there."""
        found: dict[str, Destination] = {}
        for module in self.modules():
            if module is not self and isinstance(module, Loadable):
                found.update(module.destinations())
        return found

    def ignores(self, name: str) -> bool:
        """Tensors that checkpoints hold and the model doesn't need: a tied head, and what its layers know of."""
        return self._ignores(name) or (name == "lm_head.weight" and self.lm_head is None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step must read (an embedding that is not the head contributes one row)."""
        names = self.destinations()
        if self.lm_head is not None:
            del names["model.embed_tokens.weight"]
        numbers = sum(math.prod(d.shape) for d in names.values() if not d.optional)
        return numbers * self.dtype.itemsize
