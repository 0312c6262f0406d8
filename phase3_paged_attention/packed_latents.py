"""A packed cache of latents on torch's path: the layer that writes it, and a backend that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase2_rope.deepseek import LatentSpec
from phase2_rope.layers import LatentAttention
from phase2_rope.mla import PagedLatentAttention
from phase3_paged_attention.latent_format import PackedLatents


class Unpacking:
    """A packed cache as those see it who gather from it: what is indexed is unpacked, and nothing else.

    Args:
        entries: [..., 1, bytes] uint8.
        how: they are packed.
    """

    def __init__(self, entries: Tensor, how: PackedLatents) -> None:
        self.entries, self.how = entries, how

    @property
    def shape(self) -> torch.Size:
        """Of the unpacked cache."""
        return torch.Size((*self.entries.shape[:-1], self.how.latent + self.how.rope))

    def flatten(self, first: int, last: int) -> Unpacking:
        """As `Tensor.flatten`, of dims before the entry."""
        return Unpacking(self.entries.flatten(first, last), self.how)

    def __getitem__(self, index: Any) -> Tensor:
        return self.how.unpack(self.entries[index])


class PackedLatentTorch(PagedLatentAttention):
    """Phase 2's backend on a packed cache: what a step reads is unpacked, then all is as before.

    Args:
        how: entries are packed.
        round_up: see `PagedTorchAttention`.
    """

    def __init__(self, how: PackedLatents, round_up: int = 1) -> None:
        super().__init__(round_up)
        self.how = how

    def steady(self, round_up: int) -> PackedLatentTorch:
        """See `AttentionBackend`."""
        return PackedLatentTorch(self.how, round_up)

    def run(self, spec: LatentSpec, q: Tensor, entry: Tensor, up: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """As `PagedLatentAttention.run`; `entry` is what the cache says of the step's own tokens."""
        side: Any = Unpacking(cache, self.how)
        return super().run(spec, q, entry, up, side, plan)


class PackedLatentAttention(LatentAttention):
    """Latent attention whose new entries enter the cache packed.

    A prompt's own tokens are attended to as the cache has them: so it says the same in one piece, in chunks, or when it
    is computed again.

    Args:
        plain: the block to take projections, norms and backend from.
        how: entries are packed.
    """

    def __init__(self, plain: LatentAttention, how: PackedLatents) -> None:
        q_up = None if plain.q_norm is None or plain.q_up is None else (plain.q_norm, plain.q_up)
        parts = plain.latent_norm, plain.up, plain.out, plain.backend, plain.rope
        super().__init__(plain.spec, plain.down, q_up, *parts)
        self.how = how

    def write(
        self, q: Tensor, latent: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: Any
    ) -> tuple[Tensor, Tensor]:
        """See `LatentAttention`; `cache` is [blocks, page, 1, bytes] uint8, entries are as it has them."""
        turned, key = self.rope.rotate(q, key.unsqueeze(1), *rotary, interleaved=self.spec.interleaved)
        packed = self.how.pack(latent, key[:, 0])  # [T, 1, bytes]
        cache.index_put_(plan.slots, packed)
        return turned, self.how.unpack(packed[:, 0]) if plan.sequences else latent
