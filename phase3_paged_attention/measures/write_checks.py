"""The write that turns and quantises new keys and values, against float64: part of `check_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase2_rope.kernels import counts
from phase3_paged_attention.kernels import quantise_triton
from phase3_paged_attention.kv_format import FORMATS, KVFormat

HALF_STEP = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}  # of a normal number
SMALLEST = {torch.float8_e4m3fn: 2.0**-10, torch.float8_e5m2: 2.0**-17}  # half of the smallest subnormal
SIZES = (
    counts.Case(5, 8, 2, 64, 64),
    counts.Case(3, 6, 2, 80, 48, dtype=torch.float16),
    counts.Case(9, 8, 2, 128, 128, interleaved=True),
    counts.Case(257, 32, 8, 128, 128),
    counts.Case(4097, 32, 8, 128, 128),
)
DRY_SIZES = (counts.Case(3, 2, 1, 16, 16, dtype=torch.float16),)


def errors(device: str, *, dry: bool = False) -> dict[str, tuple[float, str]]:
    """For each format of the cache (largest error over what is allowed, its case).

    A stored number may be half a step of its format from the truth, and one more in the interpreter, which casts less
    well than a GPU.
    """
    found = {}
    for kind in dict.fromkeys(FORMATS.values()):
        off = [
            (error(kind, case, device, slack=3.0 if dry else 1.0), str(case)) for case in (DRY_SIZES if dry else SIZES)
        ]
        found[f"write {kind.name}"] = max(off)
    return found


def error(kind: KVFormat, case: counts.Case, device: str, *, slack: float = 1.0) -> float:
    """Largest error of q, of the keys and values that are read back, and of slots that were not to be written."""
    inputs = counts.Inputs.of(case, device)
    block, place = inputs.slots
    q, keys, values = counts.exact("rope_fast", inputs)  # float64, in the cache's slots
    shape = inputs.keys.shape
    poison = torch.full(shape, 0x7F, dtype=torch.uint8, device=device)
    scale = torch.full((1,), float(values.abs().max()) / kind.largest, device=device)
    kv = tuple(poison.clone().view(kind.dtype) for _ in "kv")
    scales = tuple(torch.full(shape[:3], float("nan"), device=device) if kind.per_token else scale for _ in "kv")
    given: Any = (*inputs.qkv, inputs.cos_sin, inputs.positions, inputs.slots, (*kv, *scales))
    quantise_triton.rotate_quantise_write(*given, interleaved=case.interleaved)
    worst = counts.error(((inputs.qkv[0], q),))
    unit = torch.finfo(case.dtype).eps / 2  # a turned key may be rounded to the model's type first
    for stored, own, exact in zip(kv, scales, (keys, values), strict=True):
        factor = (own[block, place] if kind.per_token else own).double()
        true = exact[block, place]  # [T, Hkv, D]
        if kind.per_token:
            right = true.abs().amax(-1) / kind.largest
            worst = max(worst, _most((factor - right).abs() / (2 * unit * right)))
            factor = factor[..., None]
        got = stored[block, place].double() * factor
        allowed = true.abs() * (HALF_STEP[kind.dtype] * slack + 2 * unit) + factor * SMALLEST[kind.dtype] * slack
        worst = max(worst, _most((got - true.clamp(-kind.largest * factor, kind.largest * factor)).abs() / allowed))
        untouched = torch.ones(shape[:2], dtype=torch.bool, device=device)
        untouched[block, place] = False
        if bool((stored.view(torch.uint8)[untouched] != 0x7F).any()):
            worst = float("inf")
    return worst


def _most(off: Tensor) -> float:
    return float(off.nan_to_num(nan=float("inf")).max())
