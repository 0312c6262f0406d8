"""The frequencies of every rope type: how a model that was trained on n positions is made to read more.

Pair i of a head turns by `position * inv_freq[i]`. High frequencies (small i) tell neighbours apart; low ones have not
gone round once in the trained context, so positions beyond it give angles that the model has never seen. Every type
slows frequencies down, some of them only, so that long texts stay within known angles:

    default   theta^(-2i/R)                                            (Su et al., 2021, arXiv 2104.09864)
    linear    all, by `factor`                                         (Chen et al., 2023, arXiv 2306.15595)
    dynamic   theta grows with the length: "NTK aware", low ones most  (bloc97 and emozilla, 2023)
    yarn      low ones by `factor`, high ones kept, a ramp over pairs; logits scaled  (Peng et al., arXiv 2309.00071)
    llama3    the same by wavelength                                   (Llama 3.1, 2024)
    longrope  each pair by a searched factor, two lists by length      (Ding et al., 2024, arXiv 2402.13753)

The arithmetic is float32 in the order of `transformers` (modeling_rope_utils.py, `ROPE_INIT_FUNCTIONS`), for a
frequency that is off by one unit in the last place is off by 0.01 rad at position 131072. R rotated of D dims a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from phase0_prototype.config import RopeConfig
from phase0_prototype.errors import ConfigError
from phase0_prototype.rotary import default_inv_freq, linear_inv_freq, llama3_inv_freq


@dataclass(frozen=True)
class Frequencies:
    """What the angles are made of.

    Attributes:
        inv_freq: [R/2] float32, radians per position.
        attention_factor: cos and sin are multiplied by it, so attention scores by its square.
    """

    inv_freq: Tensor
    attention_factor: float = 1.0


Scaling = Callable[[RopeConfig, int, int | None, int], Frequencies]
"""(rope, head_dim, context, length) -> frequencies.

`context` is the config's max_position_embeddings, which three types read; None: not known. `length` is how long the
sequence is, which two types read; 0: as short as one likes. All raise ConfigError for parameters that make no sense."""


def rotated_dims(rope: RopeConfig, head_dim: int) -> int:
    """R: how many of the first dims of a head turn (`partial_rotary_factor`, 1 if absent). Raises ConfigError."""
    share = _number(rope, "partial_rotary_factor", 1.0)
    dims = int(head_dim * share)
    if share > 1 or dims < 2 or dims % 2:
        _fail(rope, "partial_rotary_factor", f"a share of {head_dim} dims that is even and at least 2, not {dims}")
    return dims


def default(rope: RopeConfig, head_dim: int, context: int | None = None, length: int = 0) -> Frequencies:
    """No scaling."""
    return Frequencies(default_inv_freq(rope, rotated_dims(rope, head_dim)))


def linear(rope: RopeConfig, head_dim: int, context: int | None = None, length: int = 0) -> Frequencies:
    """Position interpolation: every frequency divided by `factor`."""
    _number(rope, "factor")
    return Frequencies(linear_inv_freq(rope, rotated_dims(rope, head_dim)))


def dynamic(rope: RopeConfig, head_dim: int, context: int | None = None, length: int = 0) -> Frequencies:
    """NTK scaling by length: below `context` nothing changes, beyond it theta grows with every token."""
    return Frequencies(dynamic_inv_freq(rope, head_dim, context, torch.tensor([length]))[0])


def dynamic_inv_freq(rope: RopeConfig, head_dim: int, context: int | None, lengths: Tensor) -> Tensor:
    """What `dynamic` gives for each of these lengths [N] int64: [N, R/2] float32. Raises ConfigError."""
    context, factor, dims = _context(rope, context), _number(rope, "factor"), rotated_dims(rope, head_dim)
    if dims == 2:
        _fail(rope, "partial_rotary_factor", "at least 4 rotated dims, for theta grows by a power of R / (R - 2)")
    beyond = (factor * lengths / context - (factor - 1)) ** (dims / (dims - 2))
    growth = torch.where(lengths > context, beyond, 1.0)[:, None]
    return 1.0 / ((rope.theta * growth) ** _exponents(dims))


def llama3(rope: RopeConfig, head_dim: int, context: int | None = None, length: int = 0) -> Frequencies:
    """Pairs whose wavelength is above original / low_freq_factor are slowed by `factor`, those below original /
    high_freq_factor kept, a ramp between."""
    for key in ("factor", "low_freq_factor", "original_max_position_embeddings"):
        _number(rope, key)
    if _number(rope, "high_freq_factor") <= _number(rope, "low_freq_factor"):
        _fail(rope, "high_freq_factor", f"more than low_freq_factor = {rope.parameters['low_freq_factor']}")
    return Frequencies(llama3_inv_freq(rope, rotated_dims(rope, head_dim)))


def yarn(rope: RopeConfig, head_dim: int, context: int | None = None, length: int = 0) -> Frequencies:
    """NTK by parts: pairs that turn more than beta_fast times in the original context are kept, those that turn less
    than beta_slow times divided by `factor`, a linear ramp between; and attention scores grow by mscale."""
    dims, original = rotated_dims(rope, head_dim), _number(rope, "original_max_position_embeddings")
    factor = _factor(rope, context, original)
    if rope.theta == 1:
        raise ConfigError("rope_theta is 1, which makes all frequencies equal: rope type 'yarn' needs another")

    def pair(rotations: float) -> float:  # which pair turns so often in the original context
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = pair(_number(rope, "beta_fast", 32))
    high = pair(_number(rope, "beta_slow", 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # a step in place of a ramp
    kept = 1 - ((torch.arange(dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = rope.theta ** _exponents(dims)
    inv_freq = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return Frequencies(inv_freq, _yarn_attention(rope, factor))


def longrope(rope: RopeConfig, head_dim: int, context: int | None = None, length: int = 0) -> Frequencies:
    """Each frequency divided by a factor of its own: `long_factor` for lengths beyond the original context, else
    `short_factor`."""
    dims, original = rotated_dims(rope, head_dim), _number(rope, "original_max_position_embeddings")
    if original <= 1:
        _fail(rope, "original_max_position_embeddings", "more than 1")
    factors = {key: _list(rope, key, dims // 2) for key in ("short_factor", "long_factor")}
    attention = _number_or_none(rope, "attention_factor")
    if attention is None:
        factor = _factor(rope, context, original)
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    chosen = factors["long_factor" if length > original else "short_factor"]
    return Frequencies(1.0 / (torch.tensor(chosen) * rope.theta ** _exponents(dims)), attention)


SCALINGS: Mapping[str, Scaling] = MappingProxyType(
    {
        "default": default,
        "linear": linear,
        "dynamic": dynamic,
        "yarn": yarn,
        "llama3": llama3,
        "longrope": longrope,
    }
)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature for a context that grew by `factor`: 0.1 * weight * ln(factor) + 1.

    DeepSeek multiplies its softmax scale by the square of mscale(factor, mscale_all_dim).
    """
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention(rope: RopeConfig, factor: float) -> float:
    given = _number_or_none(rope, "attention_factor")
    if given is not None:
        return given
    if not (rope.parameters.get("mscale") and rope.parameters.get("mscale_all_dim")):
        return mscale(factor)
    return mscale(factor, _number(rope, "mscale")) / mscale(factor, _number(rope, "mscale_all_dim"))


def _exponents(dims: int) -> Tensor:
    """2i/R for i in 0 .. R/2-1; [R/2] float32."""
    return torch.arange(0, dims, 2, dtype=torch.int64).float() / dims


def _context(rope: RopeConfig, context: int | None) -> int:
    if context is None:
        raise ConfigError(f"rope type {rope.rope_type!r} needs max_position_embeddings: add it to config.json")
    return context


def _factor(rope: RopeConfig, context: int | None, original: float) -> float:
    """How much longer the context has become: `factor`, or derived where the file leaves it out."""
    given = _number_or_none(rope, "factor")
    return _context(rope, context) / original if given is None else given


def _number(rope: RopeConfig, key: str, default: float | None = None) -> float:
    """A number above 0; the default, if there is one, where the key is absent or null."""
    value = rope.parameters.get(key)
    if value is None and default is not None:
        return default
    if not _is_positive(value):
        _fail(rope, key, "a number above 0")
    return value


def _number_or_none(rope: RopeConfig, key: str) -> float | None:
    return None if rope.parameters.get(key) is None else _number(rope, key)


def _list(rope: RopeConfig, key: str, length: int) -> list[float]:
    value = rope.parameters.get(key)
    if not isinstance(value, list) or len(value) != length or not all(map(_is_positive, value)):
        _fail(rope, key, f"a list of {length} numbers above 0, one for each pair of rotated dims")
    return value


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _fail(rope: RopeConfig, key: str, expected: str) -> NoReturn:
    value = rope.parameters.get(key)
    found = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
    raise ConfigError(f"rope type {rope.rope_type!r}: {key} is {found}, expected {expected}: see config.json")
