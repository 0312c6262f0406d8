"""The measures of the gates of tasks 2.1 and 2.2: each takes a ``Use`` and returns the number that is graded."""

from __future__ import annotations

from pathlib import Path

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase2_rope.kernels import counts
from phase2_rope.kernels.counts import Case

ROOM = "phase2_rope"
ARCHS = ("sm_80", "sm_90", "sm_120")
FEW_HEADS = Case(q_heads=2, k_heads=1, dim=64, rotated=64)


def rope_error(use: Use) -> float:
    """Largest error of ``rope_tokens`` over what one rounding allows; needs a C++ compiler."""
    return counts.worst_error(_file(use), "rope_tokens")


def rope_overhead(use: Use) -> float:
    """Bytes that ``rope_tokens`` moves over the fewest possible; needs a C++ compiler."""
    return counts.overhead(_file(use), "rope_tokens", Case())


def rope_requests(use: Use) -> float:
    """Global memory instructions of a warp for a token of 8 + 2 heads of 128 in bfloat16; needs a C++ compiler."""
    return counts.requests_per_token(_file(use), "rope_tokens", Case())


def rope_threads(use: Use) -> float:
    """Threads for each pair of vectors of 2 + 1 heads of 64."""
    return counts.threads_per_vector(_file(use), "rope_tokens", FEW_HEADS)


def rope_spills(use: Use) -> float:
    """Bytes that ``rope_tokens`` and ``rope_fast`` spill, all types, sm_80, sm_90 and sm_120; needs NVRTC."""
    from module0_profiling.static_report import report_cuda
    from phase2_rope.kernels.rope import SCALARS

    source, names = _file(use), ("rope_tokens", "rope_fast")
    reports = [report for macro in SCALARS.values() for report in report_cuda(source, ARCHS, defines=(macro,))]
    return float(sum(report.spill_bytes for report in reports if report.kernel in names))


def rope_share_of_copy(use: Use) -> float:
    """Bytes per second of ``rope_tokens`` at 65536 tokens over those of a copy, in one run; needs CUDA."""
    from phase2_rope.kernel_cases import against_copy

    return against_copy(_file(use), "rope_tokens")


def write_error(use: Use) -> float:
    """Largest error of ``rope_fast`` over what one rounding allows; needs a C++ compiler."""
    return counts.worst_error(_file(use), "rope_fast")


def write_overhead(use: Use) -> float:
    """Bytes that ``rope_fast`` moves over the fewest possible; needs a C++ compiler."""
    return counts.overhead(_file(use), "rope_fast", Case())


def write_requests(use: Use) -> float:
    """Global memory instructions of a warp for a token of 8 + 2 heads of 128 in bfloat16; needs a C++ compiler."""
    return counts.requests_per_token(_file(use), "rope_fast", Case())


def write_over_two_launches(use: Use) -> float:
    """Time of ``rope_tokens`` and ``kv_write`` over that of ``rope_fast`` at 256 tokens, in one run; needs CUDA."""
    from phase2_rope.kernel_cases import two_launches_over_one

    return two_launches_over_one(_file(use))


def _file(use: Use) -> Path:
    return parts.path(ROOM, "kernels.rope", use, suffix=".cu")
