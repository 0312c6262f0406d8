"""Layers of phase 4: phase 3's, and on a CPU each piece between two products as one call, and the products faster.

Of the operators of an eager decode step less than a tenth are products with weights; the rest moves a few kilobytes
and costs its calls. Here a layer is nine calls. What the kernels don't know (float16, other activations and norms)
stays torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from phase0_prototype.layers import ACTIVATIONS, MLP, RMSNorm
from phase0_prototype.linear import Linear, best_format
from phase3_paged_attention.layers import PagedLayers
from phase4_scheduler import cpu_rope
from phase4_scheduler.kernels import cpu


class Panels:
    """The weight in panels (kernels/product.cpp) where its shape allows, else in torch's best format. On CPUs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.other = best_format(torch.device("cpu"), dtype)

    def create(self, layer: Linear) -> None:
        """Uninitialised panels."""
        shape = _cut(layer)
        if shape is None:
            self.other.create(layer)
        else:
            layer.weight = torch.empty(shape, dtype=layer.dtype, device=layer.device)

    def load(self, layer: Linear, start: int, tensor: Tensor) -> None:
        """Write a part where it belongs, straight from the checkpoint."""
        if _cut(layer) is None:
            self.other.load(layer, start, tensor)
        else:
            end = start + len(tensor)
            cpu.fill_panels(layer.weight[start // cpu.COLUMNS : end // cpu.COLUMNS], tensor)

    def finish(self, layer: Linear) -> None:
        """Nothing more for panels."""
        if _cut(layer) is None:
            self.other.finish(layer)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """`cpu.product`."""
        if layer.weight.dim() == 2:
            return self.other.apply(layer, x)
        return cpu.product(x, layer.weight, layer.bias)


def _cut(layer: Linear) -> tuple[int, int, int, int] | None:
    """The shape of its panels; None where it or one of its parts can't be cut into them."""
    if any(part.rows % cpu.COLUMNS for part in layer.parts):
        return None
    return cpu.in_panels(layer.out_features, layer.in_features)


class CpuNorm(RMSNorm):
    """See `RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> same."""
        return cpu.rms_norm(x, self.weight, self.eps)


class CpuMLP(MLP):
    """See `MLP`; activation and product of its halves in one go."""

    def __init__(self, plain: MLP, activation: str) -> None:
        super().__init__(plain.gate_up, plain.down, ACTIVATIONS[activation])
        self.name_of_activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down(cpu.gated(self.gate_up(x), self.name_of_activation))  # type: ignore[no-any-return]


class CpuLayers(PagedLayers):
    """See `PagedLayers`; for CPUs that `why_not_cpu_kernels` has nothing against."""

    def __init__(self, *described: Any, **settings: Any) -> None:
        super().__init__(*described, **settings)
        self.served = self.dtype in cpu.DTYPES
        if self.served:
            self.rope: Any = cpu_rope
        if self.dtype == torch.bfloat16 and cpu.why_not_product() is None:
            self.number_format = Panels(self.dtype)

    def norm(self, name: str, size: int) -> RMSNorm:
        """Root-mean-square normalisation over the last `size` numbers."""
        plain = super().norm(name, size)
        if not self.served or type(plain) is not RMSNorm:
            return plain
        return CpuNorm(name, size, plain.eps, self.dtype, self.device)

    def mlp(self, name: str) -> nn.Module:
        """The feed-forward block."""
        plain, activation = super().mlp(name), self.config.activation
        if not self.served or activation not in cpu.GATES or not isinstance(plain, MLP):
            return plain
        return CpuMLP(plain, activation)
