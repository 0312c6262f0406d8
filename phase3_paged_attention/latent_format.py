"""The FP8 entry of a cache of latents: 656 bytes for DeepSeek-V3 where bfloat16 has 1,152.

    0       512 numbers of the latent, e4m3
    512     4 float32 scales, one for each 128 of them: a number is what is stored times its scale
    528     64 numbers of the rotary key, 2 bytes each

Position is in the rotary key, and its large numbers stand beside small ones that matter: it stays as it is. The layout
is that of FlashMLA and of vLLM's `fp8_ds_mla`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PACKED = "fp8_ds_mla"  # the name of it, as in `kv_cache_dtype`
GROUP = 128  # numbers that share a scale
LARGEST = 448.0  # of e4m3; a cast of more is no number, or wraps
SCALE_BYTES = 4
ROPE_BYTES = 2


@dataclass(frozen=True)
class PackedLatents:
    """How entries of L + R numbers are packed.

    Attributes:
        latent: L, a multiple of 128.
        rope: R, even.
        dtype: of the model: rotary keys are kept in it if it has two bytes, else in bfloat16.

    Raises:
        ValueError: other L or R.
    """

    latent: int
    rope: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.latent % GROUP or self.rope % 2:
            raise ValueError(
                f"latents of {self.latent} + {self.rope} numbers can't be packed: the first is to be a multiple of "
                f"{GROUP}, the second even"
            )

    @property
    def groups(self) -> int:
        """Scales of an entry."""
        return self.latent // GROUP

    @property
    def rope_dtype(self) -> torch.dtype:
        """Of the rotary key as it is stored."""
        return self.dtype if self.dtype.itemsize == ROPE_BYTES else torch.bfloat16

    @property
    def entry_bytes(self) -> int:
        """Bytes that a token leaves in the cache of a layer."""
        return self.latent + SCALE_BYTES * self.groups + ROPE_BYTES * self.rope

    def pack(self, latent: Tensor, rope_key: Tensor) -> Tensor:
        """Entries of some tokens.

        Args:
            latent: [T, L], any floating type.
            rope_key: [T, R], turned.

        Returns:
            [T, 1, entry_bytes] uint8. Groups are scaled so that their largest number is e4m3's.
        """
        grouped = latent.float().unflatten(-1, (self.groups, GROUP))  # [T, groups, 128]
        scales = grouped.abs().amax(-1, keepdim=True) / LARGEST
        scales = torch.where(scales > 0, scales, 1.0)  # a group of zeros, or of numbers whose scale is none
        numbers = (grouped / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        parts = (numbers.flatten(-2), scales.squeeze(-1), rope_key.to(self.rope_dtype))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1).unsqueeze(-2)

    def unpack(self, entries: Tensor) -> Tensor:
        """[..., entry_bytes] uint8 -> [..., L + R] of the model's type."""
        sizes = (self.latent, SCALE_BYTES * self.groups, ROPE_BYTES * self.rope)
        numbers, scales, turned = (part.contiguous() for part in entries.split(sizes, dim=-1))
        grouped = numbers.view(torch.float8_e4m3fn).float().unflatten(-1, (self.groups, GROUP))
        latent = grouped * scales.view(torch.float32).unsqueeze(-1)
        return torch.cat((latent.flatten(-2).to(self.dtype), turned.view(self.rope_dtype).to(self.dtype)), dim=-1)
