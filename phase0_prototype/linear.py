"""Linear layers: which rows of the checkpoint they hold (parts), and in which form the weight is kept (format).

A layer may hold several matrices of the checkpoint side by side (q, k and v; gate and up): one product reads the input
once and keeps all cores busy. A format owns what it stores: it creates, fills and applies the weight, so that quantised
formats (phase 5) and sharded layers (phase 6) compose without knowing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phase0_prototype.matvec import matvec
from phase0_prototype.weights import Destination


@dataclass(frozen=True)
class Part:
    """One matrix of the checkpoint: its name without ".weight", and its rows (out features)."""

    name: str
    rows: int


class LinearFormat(Protocol):
    """How a linear layer stores its weight and multiplies by it."""

    def create(self, layer: Linear) -> None:
        """Allocate what loading fills."""
        ...

    def load(self, layer: Linear, start: int, tensor: Tensor) -> None:
        """Put one part's weight [rows, in] at output row `start`."""
        ...

    def finish(self, layer: Linear) -> None:
        """Called once when all parts are loaded."""
        ...

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """x [T, in] times the weight, plus the bias: [T, out]."""
        ...


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in], plus bias: `F.linear`, or the compiler's own loop for one row on a CPU."""
    if torch.compiler.is_compiling() and x.shape[0] == 1 and x.device.type == "cpu":
        return matvec(x, weight, bias)
    return F.linear(x, weight, bias)


class Dense:
    """The weight as it is in the checkpoint, [out, in]."""

    def create(self, layer: Linear) -> None:
        """An uninitialised [out, in] matrix in the layer's dtype."""
        layer.weight = torch.empty(layer.out_features, layer.in_features, dtype=layer.dtype, device=layer.device)

    def load(self, layer: Linear, start: int, tensor: Tensor) -> None:
        """Copy with a cast to the layer's dtype."""
        layer.weight[start : start + tensor.shape[0]].copy_(tensor)

    def finish(self, layer: Linear) -> None:
        """Nothing: the weight is ready."""

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """`dense_product`."""
        return dense_product(x, layer.weight, layer.bias)


class OneDNNPacked(Dense):
    """The weight in oneDNN's blocked order, made once after loading: what Inductor's freezing does, on CPUs only.

    `F.linear` on bfloat16 reorders the weight or takes a slow path at every call with few rows; packed, a few
    rows read the weights faster (reports/phase0.md has the figures, and what is still missing to the memory's limit).
    The plain copy is dropped: the layer never holds the weight twice.
    """

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype) -> list[str]:
        """Reasons why weights can't be packed here; these torch operators are private, so they are probed."""
        if device.type != "cpu":
            return [f"oneDNN packing is for CPUs, not {device.type}"]
        if dtype != torch.bfloat16:
            return [f"packing pays for bfloat16 only, not {dtype}"]
        if not torch.backends.mkldnn.is_available():
            return ["this torch build has no oneDNN"]
        probe = torch.ones(32, 32, dtype=dtype)
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(probe, 1)
            product = torch.ops.mkldnn._linear_pointwise(probe[:1], packed, None, "none", [], "")
        except (AttributeError, RuntimeError) as error:
            return [f"torch {torch.__version__} refuses the packed operators: {str(error).splitlines()[0]}"]
        return [] if bool((product == 32).all()) else ["the packed product is wrong on this machine"]

    def create(self, layer: Linear) -> None:
        """Nothing yet: the plain weight lives from the first part's load to `finish`, so few of them exist at once."""

    def load(self, layer: Linear, start: int, tensor: Tensor) -> None:
        """Copy a part into the plain weight, which is made when the first part comes."""
        if not hasattr(layer, "weight"):
            super().create(layer)
        super().load(layer, start, tensor)

    def finish(self, layer: Linear) -> None:
        """Reorder, and let the plain weight go."""
        layer.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 1)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """The packed product with the bias fused."""
        if torch.compiler.is_compiling():
            return packed_linear(x, layer.weight, layer.bias, layer.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")  # type: ignore[no-any-return]


@torch.library.custom_op("titaninfer::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """The packed product as an operator that Inductor leaves alone: its own lowering takes frozen weights only."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@packed_linear.register_fake
def _packed_linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class Linear(nn.Module):
    """A replicated linear layer made of `parts` stacked along the output.

    Args:
        parts: matrices of the checkpoint, in order.
        in_features: columns of each.
        bias: whether each part has one.
        number_format: how the weight is kept.
    """

    weight: Tensor

    def __init__(
        self,
        parts: tuple[Part, ...],
        in_features: int,
        *,
        bias: bool,
        number_format: LinearFormat,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.parts, self.in_features = parts, in_features
        self.out_features = sum(p.rows for p in parts)
        self.dtype, self.device, self.format = dtype, device, number_format
        self.bias = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self._missing = len(parts)
        number_format.create(self)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.format.apply(self, x)

    def destinations(self) -> Mapping[str, Destination]:
        """Where the checkpoint's tensors go."""
        out: dict[str, Destination] = {}
        start = 0
        for part in self.parts:
            out[f"{part.name}.weight"] = Destination((part.rows, self.in_features), self._weight_loader(start))
            if self.bias is not None:
                out[f"{part.name}.bias"] = Destination((part.rows,), self.bias[start : start + part.rows].copy_)
            start += part.rows
        return out

    def _weight_loader(self, start: int) -> Callable[[Tensor], None]:
        def load(tensor: Tensor) -> None:
            self.format.load(self, start, tensor)
            self._missing -= 1
            if self._missing == 0:
                self.format.finish(self)

        return load


def best_format(device: torch.device, dtype: torch.dtype, *, compiled_row: bool = False) -> LinearFormat:
    """The fastest format for dense weights on this device.

    Args:
        device, dtype: of the weights.
        compiled_row: decode steps are compiled and have one row, where `matvec` on plain weights is the faster.
    """
    return Dense() if compiled_row or OneDNNPacked.why_not(device, dtype) else OneDNNPacked()
