"""What the host needs to know of a kernel operation: its inputs, its arguments, its oracle and its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One launch: ``rows`` x ``cols`` of the result decide the grid, ``args`` follow the kernel's signature.

    ``defines`` are macros that the source is compiled with, such as its scalar type.
    """

    out: torch.Tensor
    rows: int
    cols: int
    args: tuple[torch.Tensor | int, ...]
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """An operation with a ladder of CUDA kernels in ``source`` and a twin in torch and in Triton.

    ``inputs(size, device)`` makes random float32 inputs; ``call`` turns inputs into a launch; ``reference`` is the
    torch twin, which is the oracle (in float64) and the CPU path; ``work`` returns the bytes and FLOPs that it must
    do; ``triton`` runs the Triton twin (imported on the first call, since Triton is not on every machine); ``peer``
    names what ``reference`` runs on a GPU.
    """

    name: str
    source: Path
    inputs: Callable[[int, str], Tensors]
    call: Callable[..., Call]
    reference: Callable[..., torch.Tensor]
    triton: Callable[..., torch.Tensor]
    work: Callable[..., tuple[int, int]]
    peer: str
    bench_size: int
