"""Compiles a kernel of a ``.cu`` file with NVRTC and launches it on CUDA tensors, through torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from phase0_prototype.kernels import ladder
from phase0_prototype.kernels.operation import Call, Operation

NO_GPU = "needs an NVIDIA GPU, and torch sees none here"


def run(operation: Operation, version: str, *tensors: torch.Tensor) -> torch.Tensor:
    """Runs one version of the ladder on CUDA tensors and returns its result.

    Raises RuntimeError on a machine without CUDA and ValueError for a version that the file does not have.
    """
    prepared = operation.call(*tensors)
    prepare(operation.source, version, prepared)()
    return prepared.out


def prepare(source: Path, version: str, call: Call) -> Callable[[], None]:
    """A callable that launches ``version`` of ``source`` once, compiled and with its grid set."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"{version} {NO_GPU}")
    found = ladder.find(source, version)
    kernel = _compile(source, source.stat().st_mtime_ns, version, *call.defines)
    grid, block = (*found.grid(call.rows, call.cols), 1), (*found.block, 1)
    args = list(call.args)

    def launch() -> None:
        kernel(grid=grid, block=block, args=args)

    return launch


@lru_cache(maxsize=64)
def _compile(source: Path, _modified: int, version: str, *defines: str) -> Any:
    compile_kernel = getattr(torch.cuda, "_compile_kernel", None)  # private in 2.9 to 2.13
    if compile_kernel is None:
        raise RuntimeError(f"torch {torch.__version__} has no torch.cuda._compile_kernel: use torch 2.11 to 2.13")
    options = [f"-D{name}" for name in defines]
    return compile_kernel(source.read_text(), version, nvcc_options=options or None)
