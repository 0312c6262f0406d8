"""Named ranges of the engine, for whoever is watching: `with span("forward"):`.

A kernel's name says what ran, a range says why. While torch.profiler records, a range is a `record_function`; in a
process that Nsight Systems or Nsight Compute started, it is an NVTX range; else it costs about as much as an empty
`with nullcontext()`. The watcher decides, so there is nothing to switch on.

Inside code that torch.compile traces a range vanishes: it must not split the graph, and a guard on whether a profiler
runs would compile everything again when one starts. While a CUDA graph is captured, ranges mark the capture; a replay
has none, for a replay is one launch.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling

# Set by `nsys profile` and `ncu` in the process that they start.
INJECTED = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_PORT_BASE")
NVTX = any(name in os.environ for name in INJECTED) and torch.version.cuda is not None


class _Off:
    """A range that nobody watches. One object serves all: it holds nothing. Static methods take half of the time."""

    __slots__ = ()

    @staticmethod
    def __enter__() -> None:
        return

    @staticmethod
    def __exit__(kind: object, error: object, traceback: object) -> None:
        return


class NvtxRange:
    """A range on the timeline of Nsight Systems, of the thread that enters it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *error: object) -> None:
        torch.cuda.nvtx.range_pop()


_OFF = _Off()


def span(name: str) -> AbstractContextManager[object, None]:
    """A range around the body of `with`; ranges nest, and an exception ends them like any other way out."""
    if is_dynamo_compiling():
        return nullcontext()
    if profiler._is_profiler_enabled:  # torch keeps this flag for such checks: no call into C++
        return profiler.record_function(name)
    return NvtxRange(name) if NVTX else _OFF
