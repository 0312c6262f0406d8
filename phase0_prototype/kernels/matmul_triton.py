"""Triton twin of ``matmul.cu`` and ``occupancy.cu``: C = A * B in float32 on the CUDA cores (no TF32).

2*m*n*k FLOPs over 4*(m*k + k*n + m*n) bytes. The author chooses the tile and the number of warps; shared memory,
registers per thread, vector width and the copies in flight follow from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from module0_profiling.triton_compile import TritonBuild


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    """One program computes BLOCK_M x BLOCK_N outputs; the sum is float32 whatever the inputs are."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, k, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * k + ks[None, :], mask=(rows[:, None] < m) & (ks[None, :] < k), other=0.0)
        b = tl.load(b_ptr + ks[:, None] * n + cols[None, :], mask=(ks[:, None] < k) & (cols[None, :] < n), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    out = c_ptr + rows[:, None] * n + cols[None, :]
    tl.store(out, total.to(c_ptr.dtype.element_ty), mask=(rows[:, None] < m) & (cols[None, :] < n))


def matmul(
    a: torch.Tensor, b: torch.Tensor, *, block_m: int = 64, block_n: int = 128, block_k: int = 16, num_warps: int = 8
) -> torch.Tensor:
    """[M, K] x [K, N] -> [M, N]; float32 or float16. Same signature as ``matmul.reference``, and the tile."""
    a, b = a.contiguous(), b.contiguous()
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(n, block_n), triton.cdiv(m, block_m))
    matmul_kernel[grid](a, b, out, m, n, k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps)
    return out


def _build(block_m: int, block_n: int, block_k: int, num_warps: int) -> TritonBuild:
    return TritonBuild(
        f"triton matmul {block_m}x{block_n}",
        matmul_kernel,
        {"a_ptr": "*fp32", "b_ptr": "*fp32", "c_ptr": "*fp32", "m": "i32", "n": "i32", "k": "i32"},
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
        divisible=("a_ptr", "b_ptr", "c_ptr", "m", "n", "k"),
        num_warps=num_warps,
    )


AOT = (_build(64, 128, 16, 8), _build(64, 64, 16, 8))
