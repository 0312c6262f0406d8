"""Launches a version of a ``.cu`` file on CPU tensors through the emulation: the place of ``launch`` in a dry run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from module0_profiling.cuda_on_cpu import emulator
from phase0_prototype.kernels import ladder
from phase0_prototype.kernels.operation import Call


def prepare(source: Path, version: str, call: Call) -> Callable[[], None]:
    """Like ``launch.prepare``, for tensors of about 100 by 100. Raises ``MissingTool`` without a C++ compiler."""
    found = ladder.find(source, version)
    grid, block = found.grid(call.rows, call.cols), found.block
    args = [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in call.args]
    kernels = emulator(source)

    def launch() -> None:
        kernels.launch(version, grid, block, args)

    return launch
