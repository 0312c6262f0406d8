"""A weight times one row of activations, for Inductor to compile: the products of a compiled step of one sequence.

`F.linear` on one bfloat16 row is bound by its own instructions: one core here reads at a third of the memory's rate.
As "multiply and sum along the row", Inductor makes the loop that one would write by hand: one row of the weight after
another, 32 numbers at a time, threads over rows, the bias and what follows fused behind it. Three things decide the
speed of that loop (reports/phase0.md has the figures):

* The input is computed once, into memory and in float32. Inductor would inline the normalisation before it into the
  loop, for every row again; and with bfloat16 inputs half of the loop's instructions convert the same numbers.
* A sum of more than 4096 numbers gets compensated summation, at half the speed. Shorter pieces are summed on their own.
* Four rows from four quarters of the weight in one pass: the input is loaded once for four products, and four streams
  hide more of the memory's latency than one.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

LONGEST_SUM = 4096
STREAMS = 4


def prepare() -> None:
    """Register `realize`, torch's one operator that says "compute this into memory here": a second to import."""
    importlib.import_module("torch._inductor.test_operators")


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [1, in] times weight [out, in], plus bias [out]: [1, out] in x's dtype, accumulated in float32.

    To be traced by torch.compile, after `prepare`.
    """
    columns = weight.shape[1]
    pieces = next(n for n in range(1, columns + 1) if columns % n == 0 and columns // n <= LONGEST_SUM)
    wide = torch.ops._inductor_test.realize(x.float()).view(pieces, -1)
    streams = STREAMS if weight.shape[0] % STREAMS == 0 else 1
    parts = weight.view(streams, -1, pieces, columns // pieces).float()
    product = torch.cat([(part * wide).sum(-1).sum(-1) for part in parts.unbind()])  # [out]
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).unsqueeze(0)
