"""What a model keeps for each token: the sizes that every KV cache is built from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVSpec:
    """What a model stores for each token: keys and values of `num_kv_heads` heads in each of `num_layers` layers.

    A value is as wide as a key unless `value_dim` says otherwise: phase 2's latents are keys and values in one, so 0.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    value_dim: int | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in a key and in a value of one head."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache for one token, all layers."""
        return self.num_layers * self.num_kv_heads * sum(self.widths) * self.dtype.itemsize
