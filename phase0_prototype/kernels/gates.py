"""The measures of the gates of tasks 0.4, 0.5 and 0.6: each takes a ``Use`` and returns the number that is graded."""

from __future__ import annotations

from pathlib import Path

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.kernels import counts

ROOM = "phase0_prototype"
ARCHS = ("sm_80", "sm_90", "sm_120")


def transpose_error(use: Use) -> float:
    """Wrong elements of ``transpose_fast``; needs a C++ compiler."""
    return counts.transpose_error(_file("coalescing", use))


def transpose_sector_overhead(use: Use) -> float:
    """Sectors moved over the fewest possible; needs a C++ compiler."""
    return counts.sector_overhead(_file("coalescing", use))


def transpose_bank_conflicts(use: Use) -> float:
    """Extra passes over shared memory per request; needs a C++ compiler."""
    return counts.bank_conflicts(_file("coalescing", use))


def transpose_requests(use: Use) -> float:
    """Global memory instructions of a warp per 32 elements; needs a C++ compiler."""
    return counts.transpose_requests(_file("coalescing", use))


def matmul_error(use: Use) -> float:
    """Largest error of ``matmul_fast``; needs a C++ compiler."""
    return counts.matmul_error(_file("matmul", use))


def matmul_load_reduction(use: Use) -> float:
    """Global loads of a product without reuse over those of ``matmul_fast``; needs a C++ compiler."""
    return counts.global_load_reduction(_file("matmul", use))


def matmul_speedup(use: Use) -> float:
    """Time of ``matmul_naive`` over that of ``matmul_fast`` at 4096, in one run; needs CUDA."""
    return _ratio(use, "matmul_naive")


def matmul_over_cublas(use: Use) -> float:
    """Time of cuBLAS float32 over that of ``matmul_fast`` at 4096, in one run (0.8 = 80 % of cuBLAS); needs CUDA."""
    return _ratio(use, "cuBLAS")


def occupancy_error(use: Use) -> float:
    """Largest error of ``occupancy_fast``; needs a C++ compiler."""
    return counts.matmul_error(_file("occupancy", use), "occupancy_fast")


def occupancy_reuse(use: Use) -> float:
    """Multiply-adds for each float that ``occupancy_fast`` reads from shared memory; needs a C++ compiler."""
    return counts.multiply_adds_per_shared_read(_file("occupancy", use))


def occupancy_fraction(use: Use) -> float:
    """Smallest theoretical occupancy of ``occupancy_fast`` on sm_80, sm_90, sm_120; 0 when it spills; needs NVRTC."""
    source = _file("occupancy", use)
    return min(counts.theoretical_occupancy(source, arch=arch) for arch in ARCHS)


def _ratio(use: Use, slow: str) -> float:
    from module0_profiling.timing import interleave, ratio
    from phase0_prototype.kernels.launch import prepare
    from phase0_prototype.kernels.matmul import call, inputs

    source = _file("matmul", use)
    a, b = inputs(4096, "cuda")
    prepared = call(a, b)
    other = (lambda: a @ b) if slow == "cuBLAS" else prepare(source, slow, prepared)
    timings = interleave({"slow": other, "fast": prepare(source, "matmul_fast", prepared)}, device="cuda")
    return ratio(timings["slow"], timings["fast"])


def _file(name: str, use: Use) -> Path:
    return parts.path(ROOM, f"kernels.{name}", use, suffix=".cu")
