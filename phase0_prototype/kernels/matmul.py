"""Matrix product: host side of ``matmul.cu``. ``python -m phase0_prototype.kernels.matmul`` checks and times it."""

from __future__ import annotations

from pathlib import Path

import torch

from phase0_prototype.kernels.ladder import Version
from phase0_prototype.kernels.operation import Call, Operation, Tensors

SOURCE = Path(__file__).with_suffix(".cu")
FLOAT = 4  # bytes


def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The torch twin: [M, K] x [K, N] -> [M, N]; cuBLAS in float32 on a GPU (TF32 is off by default)."""
    return a @ b


def inputs(size: int, device: str) -> Tensors:
    """Two random float32 matrices [size, size]."""
    return torch.randn(size, size, device=device), torch.randn(size, size, device=device)


def call(a: torch.Tensor, b: torch.Tensor) -> Call:
    """Arguments of every kernel of the ladder for contiguous float32 a [M, K] and b [K, N]."""
    (m, k), (k_of_b, n) = a.shape, b.shape
    if k != k_of_b:
        raise ValueError(f"a is {m}x{k} and b is {k_of_b}x{n}: the inner sizes must be equal")
    out = torch.empty(m, n, dtype=torch.float32, device=a.device)
    return Call(out, m, n, (a.contiguous(), b.contiguous(), out, m, n, k))


def work(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    """(bytes, FLOPs): each element of a, b and the result moves once."""
    (m, k), n = a.shape, b.shape[1]
    return FLOAT * (m * k + k * n + m * n), 2 * m * n * k


def triton(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The Triton twin."""
    from phase0_prototype.kernels.matmul_triton import matmul

    return matmul(a, b)


def predicted_loads(version: Version, m: int, n: int, k: int) -> int:
    """Floats that a version loads from global memory.

    Without tiles each output loads its row of A and its column of B. With tiles A is loaded once for each column of
    blocks and B once for each row of blocks; what lies outside of the matrices is not loaded.
    """
    if version.name in ("matmul_naive", "matmul_coalesced"):
        return 2 * m * n * k
    grid_x, grid_y = version.grid(m, n)
    return m * k * grid_x + k * n * grid_y


OPERATION = Operation("matmul", SOURCE, inputs, call, reference, triton, work, peer="cuBLAS float32", bench_size=4096)

if __name__ == "__main__":
    from phase0_prototype.kernels.harness import main

    main(OPERATION)
