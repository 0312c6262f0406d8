"""How a cache keeps numbers in 8 bits: the formats, and what a tensor becomes in them and back.

FP8 (Micikevicius et al., 2022, arXiv 2209.05433) is a sign, an exponent and a mantissa, as any float: e4m3 has 3 bits
of mantissa and ends at 448, e5m2 has 2 and ends at 57344. A number is stored divided by a scale, which brings the
largest to the end of the format. One scale for each tensor costs nothing to store and must be known beforehand
(calibrate.py); one for each key and value of a head is 4 bytes beside D, known as soon as the key is, and never wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase0_prototype.errors import UserError

LEAST_SCALE = torch.finfo(torch.float32).tiny  # its inverse is finite: a head of zeros stays zeros


@dataclass(frozen=True)
class KVFormat:
    """A way to keep keys and values.

    Attributes:
        name: as in `kv_cache_dtype`.
        dtype: of the stored numbers.
        per_token: whether each key and value of a head has a scale of its own; else a layer's keys have one, and its
            values.
    """

    name: str
    dtype: torch.dtype
    per_token: bool = False

    @property
    def largest(self) -> float:
        """The largest finite number of the type: 448 or 57344."""
        return float(torch.finfo(self.dtype).max)

    def scales_of(self, x: Tensor) -> Tensor:
        """The scale of every key or value: the largest of its D numbers becomes the largest of the format.

        Args:
            x: [..., D].

        Returns:
            [...] float32, above 0.
        """
        return (x.float().abs().amax(-1) * (1 / self.largest)).clamp_min(LEAST_SCALE)

    def quantise(self, x: Tensor, scale: Tensor) -> Tensor:
        """x / scale, rounded to the nearest number of the format.

        What lies beyond its ends becomes the end: casts differ in that (infinity, NaN, or 500 as 256). NaN stays NaN.

        Args:
            x: [..., D].
            scale: float32, [1] or one for each key or value, [...].

        Returns:
            [..., D] of the format's type.
        """
        scaled = x.float() * scale.reciprocal().unsqueeze(-1)
        return scaled.clamp(-self.largest, self.largest).to(self.dtype)


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored numbers [..., D] times their scale, [1] or [...]: [..., D] of this type."""
    return (stored.float() * scale.unsqueeze(-1)).to(dtype)


E4M3 = KVFormat("fp8_e4m3", torch.float8_e4m3fn)
FORMATS: dict[str, KVFormat] = {
    "fp8": E4M3,
    "fp8_e4m3": E4M3,
    "fp8_e5m2": KVFormat("fp8_e5m2", torch.float8_e5m2),
    "fp8_per_token_head": KVFormat("fp8_per_token_head", torch.float8_e4m3fn, per_token=True),
}


def format_of(kv: tuple[Tensor, ...]) -> KVFormat:
    """The format of a layer's cache: keys, values, and the scales of both."""
    stored, scales = kv[0].dtype, kv[2]
    return next(f for f in FORMATS.values() if f.dtype == stored and f.per_token == (scales.dim() > 1))


def checked_scale(value: Any, where: str) -> float:
    """The value, if it is one that numbers can be divided by. Raises UserError, naming `where` it stands."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UserError(f"{where} is {value!r}: a scale of the KV cache is a number above 0")
    return float(value)
