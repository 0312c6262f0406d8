"""Runs CUDA C++ kernels on a CPU, unchanged: an oracle and an exact counter for machines without a GPU.

A ``.cu`` file is compiled by the host compiler together with ``device.h`` (CUDA's words) and ``runtime.cpp`` (threads
as fibers, every memory access recorded). Slow, meant for matrices of about 100 by 100; what it counts no machine
changes.
"""

from __future__ import annotations

from module0_profiling.cuda_on_cpu.emulator import Emulator, Pointer, emulator
from module0_profiling.cuda_on_cpu.traffic import Memory, Traffic

__all__ = ["Emulator", "Memory", "Pointer", "Traffic", "emulator"]
