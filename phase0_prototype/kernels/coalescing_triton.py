"""Triton twin of ``coalescing.cu``: out[c, r] = in[r, c].

8 bytes an element, no FLOPs. Triton stages the tile in shared memory and picks a conflict-free layout itself: what the
CUDA ladder does by hand in four steps is ``tl.trans``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from module0_profiling.triton_compile import TritonBuild


@triton.jit
def transpose_kernel(x_ptr, out_ptr, rows, cols, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """One program turns one BLOCK x BLOCK tile."""
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (r[:, None] < rows) & (c[None, :] < cols)
    tile = tl.load(x_ptr + r[:, None] * cols + c[None, :], mask=inside, other=0.0)
    turned = (c[:, None] < cols) & (r[None, :] < rows)
    tl.store(out_ptr + c[:, None] * rows + r[None, :], tl.trans(tile), mask=turned)


def transpose(matrix: torch.Tensor, *, block: int = 64, num_warps: int = 4) -> torch.Tensor:
    """[R, C] -> [C, R], contiguous; float32 or float16. Same signature as ``coalescing.reference``."""
    matrix = matrix.contiguous()
    rows, cols = matrix.shape
    out = torch.empty(cols, rows, dtype=matrix.dtype, device=matrix.device)
    grid = (triton.cdiv(cols, block), triton.cdiv(rows, block))
    transpose_kernel[grid](matrix, out, rows, cols, BLOCK=block, num_warps=num_warps)
    return out


AOT = (
    TritonBuild(
        "triton transpose",
        transpose_kernel,
        {"x_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32", "cols": "i32"},
        {"BLOCK": 64},
        divisible=("x_ptr", "out_ptr", "rows", "cols"),
    ),
)
