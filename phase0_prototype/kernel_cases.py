"""Benchmark cases of the CUDA trilogy: its static facts, which need no GPU, and its times, which need one."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

from module0_profiling.kernel_commands import kernel_sources, report_file
from module0_profiling.results import Figure

if TYPE_CHECKING:
    from phase0_prototype.kernels.operation import Operation

ROOM = "phase0_prototype"
OPERATIONS = ("coalescing", "matmul", "occupancy")
ARCHS = ("sm_80", "sm_90", "sm_120")


def static() -> tuple[Figure, ...]:
    """Registers, spills, shared memory and theoretical occupancy of every kernel on every architecture.

    Raises:
        MissingTool: neither NVRTC nor nvcc is here.
    """
    figures: list[Figure] = []
    for source in kernel_sources(ROOM):
        for r in report_file(ROOM, source, ARCHS, None):
            row = f"{r.kernel}, {r.arch}"
            figures += [
                Figure(f"{row}/registers", r.registers, "", note=r.compiler),
                Figure(f"{row}/spills", r.spill_bytes, "B"),
                Figure(f"{row}/shared memory", r.shared_bytes, "B"),
                Figure(f"{row}/occupancy", 100 * r.occupancy.fraction, "%", note=f"limited by {r.occupancy.limiter}"),
            ]
    return tuple(figures)


def timed(*, dry: bool = False) -> tuple[Figure, ...]:
    """Error and time of every version on the GPU, beside torch (cuBLAS for the products).

    ``dry`` goes the same way with tiny matrices in the emulation and Triton's interpreter; the figures mean nothing.
    """
    from phase0_prototype.kernels import harness

    figures: list[Figure] = []
    for operation in operations(dry=dry):
        errors: dict[str, float] = {}
        for checked in [] if dry else harness.check(operation):
            errors[checked.version] = max(errors.get(checked.version, 0.0), checked.error)
        size, rounds, device = (24, 1, "cpu") if dry else (None, 7, "cuda")
        for row in harness.bench(operation, size=size, rounds=rounds, device=device):
            label = row.version if row.version.startswith(operation.name) else f"{operation.name}: {row.version}"
            figures += [
                Figure(f"{label}/time", row.seconds * 1e6, "us", row.spread),
                Figure(f"{label}/x first", row.over_first, "x"),
                Figure(f"{label}/x {operation.peer}", row.over_peer, "x"),
                Figure(f"{label}/bandwidth", row.gbytes_per_second, "GB/s"),
                Figure(f"{label}/rate", row.tflops, "TFLOP/s"),
            ]
            if row.version in errors:
                figures.append(Figure(f"{label}/error", errors[row.version], ""))
    return tuple(figures)


def operations(*, dry: bool = False) -> list[Operation]:
    """The operations of the trilogy; in a dry run without Triton its twin is replaced by that in torch."""
    found: list[Operation] = [importlib.import_module(f"{ROOM}.kernels.{name}").OPERATION for name in OPERATIONS]
    if dry and importlib.util.find_spec("triton") is None:
        return [replace(operation, triton=operation.reference) for operation in found]
    return found
