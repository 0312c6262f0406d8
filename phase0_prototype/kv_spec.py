"""What a model keeps for each token: the sizes that every KV cache is built from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVPart:
    """One tensor of a layer's cache: what a token has in it, as [Hkv, ...] of a type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of one token."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class KVSpec:
    """What a model stores for each token: keys and values of `num_kv_heads` heads in each of `num_layers` layers.

    A value is as wide as a key unless `value_dim` says otherwise: phase 2's latents are keys and values in one, so 0.

    Attributes:
        dtype: of keys and values as the model computes them. They are kept so, unless `kept` says otherwise.
        kept: the tensors of a layer's cache, where they are not a key and a value of `dtype`: quantised ones, scales.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    value_dim: int | None = None
    kept: tuple[KVPart, ...] | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in a key and in a value of one head."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    @property
    def parts(self) -> tuple[KVPart, ...]:
        """The tensors of a layer's cache."""
        if self.kept is not None:
            return self.kept
        return tuple(KVPart((self.num_kv_heads, width), self.dtype) for width in self.widths)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache for one token, all layers."""
        return self.num_layers * sum(part.bytes for part in self.parts)
