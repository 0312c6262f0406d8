"""See which products with weight matrices a piece of code asks torch for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that multiply an input by a weight, and the place of the input among their arguments.
_PRODUCTS: Mapping[str, int] = MappingProxyType(
    {"aten::linear": 0, "aten::matmul": 0, "aten::mm": 0, "aten::addmm": 1, "mkldnn::_linear_pointwise": 0}
)
_SMALLEST = 1024  # numbers in a weight matrix; products of activations (q with k) are smaller on the tiny checkpoint


@dataclass(frozen=True)
class Product:
    """One product: rows of the input, numbers in each, and the shape of the weight."""

    rows: int
    in_features: int
    weight: tuple[int, ...]


class WeightProducts(TorchDispatchMode):
    """Collects the products while it is entered.

    Attributes:
        found: in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the product, then run the operator; what it is made of is not seen again."""
        place = _PRODUCTS.get(func._schema.name)
        if place is not None:
            x, weight = args[place], args[place + 1]
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.numel() >= _SMALLEST:
                self.found.append(Product(x.numel() // x.shape[-1], x.shape[-1], tuple(weight.shape)))
        return func(*args, **(kwargs or {}))
