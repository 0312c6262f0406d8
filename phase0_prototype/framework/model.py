"""A Llama forward pass in a hundred lines: read it top to bottom, then make it fast.

It is right, and it is slow for three reasons, one for each task. It looks at the whole sequence every time, because it
keeps nothing (task 0.1). It multiplies by q, k and v one after the other, and one sequence after the other (task 0.3).
And everything is launched operation by operation from Python (task 0.3).

Letters: T tokens of the batch, S tokens of one sequence, Hq query heads, Hkv key/value heads, D numbers per head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phase0_prototype.batch import Batch
from phase0_prototype.checkpoint import tensor_shapes
from phase0_prototype.config import ModelConfig
from phase0_prototype.layers import Layers
from phase0_prototype.weights import Destination

if TYPE_CHECKING:
    from .kv_cache import KVCache


class DecoderModel(nn.Module):
    """A decoder-only Transformer: token ids in, logits out.

    Args:
        config: its shape.
        layers: knows dtype, device and the rotary table; its other pieces are for your faster version.
    """

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.config, self.rotary = config, layers.rotary()
        self.kv_spec = layers.kv_spec()
        shapes = tensor_shapes(config)  # by the names that checkpoints use; a matrix is [out, in]
        self.w = {name: torch.empty(s, dtype=layers.dtype, device=layers.device) for name, s in shapes.items()}

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Logits [R, V] of the batch's `logits_rows`: each sequence on its own, one after the other."""
        starts = batch.query_start.tolist()
        hidden = [self.sequence(batch.token_ids[a:b], batch.positions[a:b]) for a, b in pairwise(starts)]
        x = torch.cat(hidden)[batch.logits_rows]  # [R, hidden]
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return x @ self.w[f"{head}.weight"].T

    def sequence(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states [S, hidden] of one whole sequence."""
        # TASK 0.1: these are all tokens of the sequence, every time. Write keys and values into the cache (`kv.layer`,
        # `batch.slot_mapping`), read those of earlier tokens back from it, and let kv_cache.py say that it keeps them.
        x = self.w["model.embed_tokens.weight"][token_ids]  # [S, hidden]
        for i in range(self.config.num_layers):
            name = f"model.layers.{i}"
            x = x + self.attention(i, self.norm(f"{name}.input_layernorm", x), positions)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm", x))
        return self.norm("model.norm", x)

    def attention(self, index: int, x: Tensor, positions: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, where a token sees itself and those before it: [S, hidden] -> [S, hidden]."""
        c, name = self.config, f"model.layers.{index}.self_attn"
        # TASK 0.3: three products that read the same x, in every layer. `Layers.linear` holds several matrices at once.
        q = self.linear(f"{name}.q_proj", x).view(-1, c.num_heads, c.head_dim)  # [S, Hq, D]
        k = self.linear(f"{name}.k_proj", x).view(-1, c.num_kv_heads, c.head_dim)  # [S, Hkv, D]
        v = self.linear(f"{name}.v_proj", x).view(-1, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        group = c.num_heads // c.num_kv_heads  # query heads that share one key head
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * c.head_dim**-0.5  # [Hq, S, S]
        distance = positions[:, None] - positions[None, :]
        hidden = distance < 0
        window = c.sliding_windows[index]
        if window is not None:
            hidden = hidden | (distance >= window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        return self.linear(f"{name}.o_proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", nn.functional.silu(gate) * up)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T, plus a bias where the checkpoint has one."""
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        """x / rms(x) * weight over the last dimension, in float32."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return y.to(x.dtype) * self.w[f"{name}.weight"]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding: turn each pair (x[i], x[i + D/2]) by an angle that grows with the position."""
        cos, sin = self.rotary(positions)  # [S, 1, D/2]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def destinations(self) -> dict[str, Destination]:
        """Where every tensor of the checkpoint goes, by its name there."""
        return {name: Destination(tuple(w.shape), w.copy_) for name, w in self.w.items()}

    def ignores(self, name: str) -> bool:
        """Tensors that checkpoints hold and the model doesn't need: a tied head, old rotary tables."""
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in self.w)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step must read (an embedding that is not the head contributes one row)."""
        unread = set() if self.config.tie_word_embeddings else {"model.embed_tokens.weight"}
        return sum(w.numel() * w.element_size() for name, w in self.w.items() if name not in unread)
