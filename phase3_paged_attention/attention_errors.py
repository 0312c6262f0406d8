"""How wrong a result of attention is, in units of what its type allows: 1 is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from phase3_paged_attention.attention_inputs import NAN_BYTE, Inputs
from phase3_paged_attention.kernels import reference

ROUNDINGS = 2  # to q's type, of the weights and of the result
STEPS = 64  # roundings to float32 that may add up, a generous bound


def exact(inputs: Inputs) -> Tensor:
    """Attention in float64, [T, Hq * D]."""
    return _attention(inputs, inputs.kv)


def allowed(inputs: Inputs, expected: Tensor) -> Tensor:
    """How far each number of a result may be from the truth, [T, Hq * D] float64.

    Weights and results are rounded to q's type, the rest to float32; a soft cap makes scores as large as itself. All of
    it is relative to attention of |values|.
    """
    keys, values, *scales = inputs.kv
    bits = values.element_size() == 1  # FP8 has no abs()
    sizes = (values.view(torch.uint8) & NAN_BYTE).view(values.dtype) if bits else values.abs()
    units = ROUNDINGS * torch.finfo(inputs.q.dtype).eps / 2
    units += (STEPS + 4 * (inputs.case.soft_cap or 0)) * torch.finfo(torch.float32).eps / 2
    return units * _attention(inputs, (keys, sizes, *scales)) + torch.finfo(torch.float32).tiny


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


def _attention(inputs: Inputs, kv: tuple[Tensor, ...]) -> Tensor:
    spec = inputs.case.spec
    return reference.attend(inputs.q.double(), kv, inputs, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap)
