"""Launches a version of a ``.cu`` file on CPU tensors through the emulation: the place of ``launch`` in a dry run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from module0_profiling.cuda_on_cpu import Pointer, emulator
from phase0_prototype.kernels import ladder
from phase0_prototype.kernels.operation import Call


def prepare(source: Path, version: str, call: Call) -> Callable[[], None]:
    """Like ``launch.prepare``, for tensors of about 100 by 100. Raises ``MissingTool`` without a C++ compiler."""
    found = ladder.find(source, version)
    grid, block = found.grid(call.rows, call.cols), found.block
    args = [pointer(arg) if isinstance(arg, torch.Tensor) else arg for arg in call.args]
    kernels = emulator(source, call.defines)

    def launch() -> None:
        kernels.launch(version, grid, block, args)

    return launch


def pointer(tensor: torch.Tensor) -> Pointer:
    """What a kernel gets of a CPU tensor: an address in its storage, of any dtype, whatever its strides.

    Tensors that share a storage share it in the kernel too, so that a kernel can work in place.
    """
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    array: np.ndarray = storage.numpy()
    return Pointer(array, int(tensor.storage_offset()) * tensor.element_size())
