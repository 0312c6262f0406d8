"""How wrong a result of attention is, in units of what its type allows: 1 is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from module0_profiling.bench_gpu import CheckFailed
from phase3_paged_attention.kernels import reference
from phase3_paged_attention.measures.attention_inputs import NAN_BYTE, Inputs

TINY = torch.finfo(torch.float32).tiny
PEER_TOLERANCE = 0.05  # of the largest result: peers round in other places
CHECKED_ROWS = 16  # of a sequence in a step that is too large to be checked whole
STEPS = 64  # roundings to float32 that may add up, a generous bound


def exact(inputs: Inputs) -> Tensor:
    """Attention in float64, [T, Hq * D]."""
    return _attention(inputs, inputs.kv)


def allowed(inputs: Inputs, expected: Tensor) -> Tensor:
    """How far each number of a result may be from the truth, [T, Hq * D] float64.

    The result is rounded to q's type. So are the weights, and the rest to float32: both relative to attention of
    |values|. A soft cap makes scores as large as itself.

    Args:
        inputs: of the step.
        expected: what `exact` says.
    """
    keys, values, *scales = inputs.kv
    bits = values.element_size() == 1  # FP8 has no abs()
    sizes = (values.view(torch.uint8) & NAN_BYTE).view(values.dtype) if bits else values.abs()
    rounding, single = (torch.finfo(dtype).eps / 2 for dtype in (inputs.q.dtype, torch.float32))
    summed = rounding + (STEPS + 4 * (inputs.case.soft_cap or 0)) * single
    return summed * _attention(inputs, (keys, sizes, *scales)) + rounding * expected.abs() + TINY


def error(got: Tensor, expected: Tensor, tolerance: Tensor) -> float:
    """Largest error over what is allowed: right is <= 1. NaN, or another shape, is infinite."""
    if got.shape != expected.shape:
        return float("inf")
    return float(((got.double() - expected).abs() / tolerance).nan_to_num(nan=float("inf")).max())


def some(inputs: Inputs, sequences: Sequence[int], rows: int) -> tuple[Inputs, Tensor]:
    """The last `rows` new tokens of some sequences as inputs of their own, and the rows that they are in the batch.

    They are what a check can afford of a step that is too large for a dense one. Trees must be taken whole.
    """
    case, start = inputs.case, inputs.query_start.tolist()
    taken = [min(rows, case.new[b]) for b in sequences]
    at = torch.cat([torch.arange(start[b + 1] - n, start[b + 1]) for b, n in zip(sequences, taken, strict=True)])
    at = at.to(inputs.q.device)
    chosen = torch.tensor(list(sequences), device=at.device)
    starts = torch.tensor((0, *taken)).cumsum(0).int().to(at.device)
    lengths = tuple(case.lengths[b] for b in sequences)
    return replace(
        inputs,
        case=replace(case, lengths=lengths, new=tuple(taken)),
        q=inputs.q[at],
        block_tables=inputs.block_tables[chosen],
        query_start=starts,
        seq_lens=inputs.seq_lens[chosen],
        visible=None if inputs.visible is None else inputs.visible[at],
    ), at


def check(name: str, got: Tensor, inputs: Inputs, exactly: bool) -> None:
    """Compare a few rows with float64: ours as exactly as arithmetic allows, peers roughly."""
    last = len(inputs.case.new) - 1
    few, rows = some(inputs, [0, last] if last else [0], 64 if inputs.case.tree else CHECKED_ROWS)
    expected = exact(few)
    judge(name, got.flatten(1)[rows], expected, allowed(few, expected), exactly, str(inputs.case))


def judge(name: str, got: Tensor, expected: Tensor, tolerance: Tensor, exactly: bool, where: str) -> None:
    """Raise CheckFailed unless a result is what it should be: up to what is allowed, or roughly.

    Args:
        name: of the subject.
        got, expected, tolerance: alike in shape; result, truth in float64, and how far they may be from one another.
        exactly: whether `tolerance` counts; else `PEER_TOLERANCE` of the largest number.
        where: the case.
    """
    off = (got.double() - expected).abs().nan_to_num(nan=float("inf"))
    if exactly and not bool((off <= tolerance).all()):
        raise CheckFailed(f"{name} is off by {float((off / tolerance).max()):.2g} times what is allowed at {where}")
    if not float(off.max()) <= PEER_TOLERANCE * float(expected.abs().max()):
        raise CheckFailed(f"{name} does not compute the same at {where}")


def _attention(inputs: Inputs, kv: tuple[Tensor, ...]) -> Tensor:
    spec = inputs.case.spec
    return reference.attend(inputs.q.double(), kv, inputs, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap)
