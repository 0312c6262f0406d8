"""Rotary position embedding: frequencies from a table by rope type, applied to a slice of heads outside attention.

Source: Su et al., "RoFormer", 2021 (arXiv 2104.09864). Pairs are (x[i], x[i + D/2]), the "neox" layout of Llama
checkpoints. Phase 2 has the other scalings, which need more than frequencies, and the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from phase0_prototype.batch import Batch
from phase0_prototype.config import RopeConfig
from phase0_prototype.errors import ConfigError


def default_inv_freq(rope: RopeConfig, head_dim: int) -> Tensor:
    """theta^(-2i/D) for i in 0..D/2-1; [D/2] float32."""
    return 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def linear_inv_freq(rope: RopeConfig, head_dim: int) -> Tensor:
    """Position interpolation (Chen et al., 2023): every frequency divided by `factor`; [D/2] float32."""
    return default_inv_freq(rope, head_dim) / _number(rope, "factor")


def llama3_inv_freq(rope: RopeConfig, head_dim: int) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between; [D/2] float32."""
    factor, low, high = (_number(rope, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = _number(rope, "original_max_position_embeddings")
    inv_freq = default_inv_freq(rope, head_dim)
    wavelength = 2 * math.pi / inv_freq
    smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


INV_FREQ: Mapping[str, Callable[[RopeConfig, int], Tensor]] = {
    "default": default_inv_freq,
    "linear": linear_inv_freq,
    "llama3": llama3_inv_freq,
}


def _number(rope: RopeConfig, key: str) -> float:
    value = rope.parameters.get(key)
    if not isinstance(value, int | float):
        raise ConfigError(f"rope type {rope.rope_type!r} needs a number for {key!r}, got {value!r}: see config.json")
    return float(value)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of every token by its position.

    Args:
        x: [T, H, D].
        cos, sin: [T, 1, D/2], in x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once in float32 and shared by all layers.

    Raises:
        ConfigError: the rope type is not in `INV_FREQ`.
    """

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        if rope.rope_type not in INV_FREQ:
            known = ", ".join(INV_FREQ)
            raise ConfigError(f"rope type {rope.rope_type!r} is not supported yet: this phase has {known}")
        angles = torch.outer(torch.arange(max_positions).float(), INV_FREQ[rope.rope_type](rope, head_dim))
        self.cos = angles.cos().to(device, dtype)  # [max_positions, D/2]
        self.sin = angles.sin().to(device, dtype)

    def places(self, batch: Batch) -> Tensor:
        """What `forward` is to be given for a batch: here the positions of its tokens."""
        return batch.positions

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for these positions [T]: two tensors [T, 1, D/2]."""
        return self.cos[places].unsqueeze(1), self.sin[places].unsqueeze(1)
