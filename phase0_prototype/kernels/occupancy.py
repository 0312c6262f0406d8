"""Tile size and occupancy: host side of ``occupancy.cu``, the product of ``matmul.py`` at many tile sizes."""

from __future__ import annotations

from pathlib import Path

import torch

from phase0_prototype.kernels.matmul import call, inputs, reference, work
from phase0_prototype.kernels.operation import Operation

SOURCE = Path(__file__).with_suffix(".cu")


def triton(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The Triton twin at the tile of ``occupancy_fast``: 64x64 outputs by 8 warps."""
    from phase0_prototype.kernels.matmul_triton import matmul

    return matmul(a, b, block_m=64, block_n=64, block_k=16, num_warps=8)


OPERATION = Operation(
    "occupancy", SOURCE, inputs, call, reference, triton, work, peer="cuBLAS float32", bench_size=2048
)

if __name__ == "__main__":
    from phase0_prototype.kernels.harness import main

    main(OPERATION)
