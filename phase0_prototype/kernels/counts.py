"""Counts of a ``.cu`` file that no machine changes; the gates of tasks 0.4 to 0.6 are made of them.

Memory traffic is counted by running the kernel on the CPU (``module0_profiling.cuda_on_cpu``), registers and occupancy
come from compiling it (``module0_profiling.static_report``). Neither needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from module0_profiling.cuda_on_cpu import Traffic, emulator
from phase0_prototype.kernels import ladder

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Emulated:
    """One launch on the CPU: the result, and what it did to memory."""

    result: np.ndarray
    traffic: Traffic


def emulate_transpose(cu_file: Path, kernel: str, matrix: np.ndarray) -> Emulated:
    """Runs a kernel of ``coalescing.cu`` on a float32 matrix [R, C]."""
    rows, cols = matrix.shape
    out = np.full((cols, rows), np.nan, dtype=np.float32)
    version = ladder.find(cu_file, kernel)
    args = (matrix, out, rows, cols)
    return Emulated(out, emulator(cu_file).launch(kernel, version.grid(rows, cols), version.block, args))


def emulate_matmul(cu_file: Path, kernel: str, a: np.ndarray, b: np.ndarray) -> Emulated:
    """Runs a kernel of ``matmul.cu`` or ``occupancy.cu`` on float32 a [M, K] and b [K, N]."""
    (m, k), n = a.shape, b.shape[1]
    out = np.full((m, n), np.nan, dtype=np.float32)
    version = ladder.find(cu_file, kernel)
    args = (a, b, out, m, n, k)
    return Emulated(out, emulator(cu_file).launch(kernel, version.grid(m, n), version.block, args))


def transpose_error(cu_file: Path, kernel: str = "transpose_fast") -> float:
    """Elements that a transpose gets wrong, over sizes with and without a ragged edge (accesses outside count too)."""
    wrong = 0
    for shape in ((64, 64), (33, 70), (44, 100)):
        matrix = _random(*shape)
        run = emulate_transpose(cu_file, kernel, matrix)
        wrong += int((run.result != matrix.T).sum()) + run.traffic.out_of_bounds + run.traffic.misaligned
    return float(wrong)


def matmul_error(cu_file: Path, kernel: str = "matmul_fast") -> float:
    """Largest error against numpy in float64, over sizes with and without a ragged edge; inf on an access outside."""
    worst = 0.0
    for m, n, k in ((128, 128, 16), (65, 40, 19), (3, 130, 33)):
        a, b = _random(m, k), _random(k, n)
        run = emulate_matmul(cu_file, kernel, a, b)
        if run.traffic.out_of_bounds or run.traffic.misaligned:
            return float("inf")
        error = np.abs(run.result - a.astype(np.float64) @ b.astype(np.float64)).max()
        worst = max(worst, float("inf") if np.isnan(error) else float(error))
    return worst


def sector_overhead(cu_file: Path, kernel: str = "transpose_fast") -> float:
    """Sectors of global memory that a transpose moves, over the fewest possible: 1.0 is fully coalesced."""
    traffic = emulate_transpose(cu_file, kernel, _random(64, 96)).traffic
    loads, stores = traffic.global_loads, traffic.global_stores
    return (loads.transactions + stores.transactions) / (loads.ideal + stores.ideal)


def bank_conflicts(cu_file: Path, kernel: str = "transpose_fast") -> float:
    """Extra passes over shared memory, per request; 0 is free of conflicts, 31 is the worst."""
    traffic = emulate_transpose(cu_file, kernel, _random(64, 96)).traffic
    requests = traffic.shared_loads.requests + traffic.shared_stores.requests
    return traffic.bank_conflicts / requests if requests else 0.0


def transpose_requests(cu_file: Path, kernel: str = "transpose_fast") -> float:
    """Memory instructions (global, of whole warps) per 32 elements: 2 with scalars, 0.5 with 128-bit vectors."""
    matrix = _random(64, 96)
    traffic = emulate_transpose(cu_file, kernel, matrix).traffic
    return (traffic.global_loads.requests + traffic.global_stores.requests) / (matrix.size / 32)


def global_loads_per_output(cu_file: Path, kernel: str = "matmul_fast") -> float:
    """Floats loaded from global memory for each output of a 128x128x32 product; 64 without any reuse."""
    a, b = _random(128, 32), _random(32, 128)
    run = emulate_matmul(cu_file, kernel, a, b)
    return run.traffic.global_loads.bytes / FLOAT / run.result.size


def global_load_reduction(cu_file: Path, kernel: str = "matmul_fast") -> float:
    """How many times fewer floats ``kernel`` loads than a product without reuse, which loads 2k for an output."""
    return 64.0 / global_loads_per_output(cu_file, kernel)


def multiply_adds_per_shared_read(cu_file: Path, kernel: str = "occupancy_fast") -> float:
    """Multiply-adds for each float read from shared memory: 0.5 with one output a thread, 4 with 8x8."""
    a, b = _random(128, 32), _random(32, 128)
    traffic = emulate_matmul(cu_file, kernel, a, b).traffic
    read = traffic.shared_loads.bytes / FLOAT
    return 128 * 128 * 32 / read if read else 0.0


def theoretical_occupancy(cu_file: Path, kernel: str = "occupancy_fast", *, arch: str = "sm_90") -> float:
    """Theoretical occupancy of a kernel, 0 when it spills: warps that wait for their own spills hide nothing."""
    from module0_profiling.static_report import report_cuda

    for report in report_cuda(cu_file, (arch,)):
        if report.kernel == kernel:
            return 0.0 if report.spill_bytes else report.occupancy.fraction
    raise ValueError(f"{cu_file.name} has no kernel {kernel!r}")


def _random(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(rows * 1000 + cols).standard_normal((rows, cols), dtype=np.float32)
