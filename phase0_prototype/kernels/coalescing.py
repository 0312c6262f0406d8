"""Transpose: host side of ``coalescing.cu``. ``python -m phase0_prototype.kernels.coalescing`` checks and times it."""

from __future__ import annotations

from pathlib import Path

import torch

from phase0_prototype.kernels.operation import Call, Operation, Tensors

SOURCE = Path(__file__).with_suffix(".cu")
FLOAT = 4  # bytes
SECTOR = 32  # bytes that move together


def reference(matrix: torch.Tensor) -> torch.Tensor:
    """The torch twin: [R, C] -> [C, R], contiguous."""
    return matrix.t().contiguous()


def inputs(size: int, device: str) -> Tensors:
    """One random float32 matrix [size, size]."""
    return (torch.randn(size, size, device=device),)


def call(matrix: torch.Tensor) -> Call:
    """Arguments of every kernel of the ladder for a contiguous float32 matrix [R, C]."""
    rows, cols = matrix.shape
    out = torch.empty(cols, rows, dtype=torch.float32, device=matrix.device)
    return Call(out, rows, cols, (matrix.contiguous(), out, rows, cols))


def work(matrix: torch.Tensor) -> tuple[int, int]:
    """(bytes, FLOPs): each element is read once and written once."""
    return 2 * FLOAT * matrix.numel(), 0


def triton(matrix: torch.Tensor) -> torch.Tensor:
    """The Triton twin."""
    from phase0_prototype.kernels.coalescing_triton import transpose

    return transpose(matrix)


def predicted_sectors(version: str, rows: int, cols: int) -> tuple[int, int]:
    """(read, written) sectors of 32 bytes, for rows and columns that are multiples of 32.

    A strided access takes a sector for each element, a coalesced one a sector for each 8.
    """
    elements = rows * cols
    coalesced = elements * FLOAT // SECTOR
    strided_reads, strided_writes = version == "transpose_write_first", version == "transpose_naive"
    return (elements if strided_reads else coalesced), (elements if strided_writes else coalesced)


OPERATION = Operation(
    "transpose", SOURCE, inputs, call, reference, triton, work, peer="torch .t().contiguous()", bench_size=8192
)

if __name__ == "__main__":
    from phase0_prototype.kernels.harness import main

    main(OPERATION)
