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

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv: tuple[Tensor, ...],
        plan: Any,
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `LatentAttention`; `kv[0]` is [blocks, page, 1, bytes] uint8."""
        spec = self.spec
        read = torch.cat([part(x) for part in self.down], dim=-1) if len(self.down) > 1 else self.down[0](x)
        q, entry = read.split((read.shape[-1] - spec.entry, spec.entry), dim=-1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q = q.reshape(-1, spec.num_heads, spec.query)  # [T, H, P + R]
        latent, key = entry.split((spec.latent, spec.rope), dim=-1)
        nope, turning = q.split((spec.nope, spec.rope), dim=-1)
        turned, key = self.rope.rotate(turning, key.unsqueeze(1), *rotary, interleaved=spec.interleaved)
        packed = self.how.pack(self.latent_norm(latent), key[:, 0])  # [T, 1, bytes]
        kv[0].index_put_(plan.slots, packed)
        entry = self.how.unpack(packed[:, 0]) if plan.sequences else entry  # decodes don't ask for it
        if turned is not turning:  # not in place
            q = torch.cat((nope, turned), dim=-1)
        q = q if rows is None else q[rows]
        return self.out(self.backend.run(spec, q, entry, self.up.weight, kv[0], plan))
