"""What a kernel costs, read from its compiled form: no GPU is needed and none is used.

For each kernel and architecture: registers, spills, shared memory, theoretical occupancy, and the instructions that
tell whether the code does what its author meant (128-bit loads, reads of shared memory, multiply-adds).
A measured time says how fast a kernel is; this says why, and which limit to lift next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from module0_profiling import instruction_mix
from module0_profiling.cuda_compile import Binary, Resources, compile_cuda, disassemble
from module0_profiling.instruction_mix import InstructionMix
from module0_profiling.occupancy import Occupancy, occupancy
from module0_profiling.triton_compile import TritonBuild, compile_triton

ARCHS = ("sm_80", "sm_90", "sm_120")
ALL_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
DEFAULT_THREADS = 256


@dataclass(frozen=True)
class KernelReport:
    """Static facts of one kernel on one architecture.

    ``threads`` is the block size that ``occupancy`` is for. ``shared_bytes`` is per block. ``mix`` counts the
    instructions of the whole kernel, a loop body once.
    """

    kernel: str
    source: str
    language: str
    arch: str
    compiler: str
    threads: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    occupancy: Occupancy
    mix: InstructionMix

    @property
    def spill_bytes(self) -> int:
        """Bytes a thread moves between registers and local memory because registers ran out."""
        return self.spill_store_bytes + self.spill_load_bytes


def report_cuda(
    source: Path,
    archs: Sequence[str] = ARCHS,
    *,
    threads: int | None = None,
    compiler: str = "auto",
    defines: Sequence[str] = (),
) -> list[KernelReport]:
    """Reports every kernel of a ``.cu`` file, compiled with the macros ``defines``.

    ``threads``: block size for the occupancy; default is each kernel's ``__launch_bounds__``, else 256. Raises
    ``MissingTool`` and ``CompileError``.
    """
    reports = []
    for arch in archs:
        binary = compile_cuda(source, arch, compiler=compiler, defines=defines)
        mixes = _mixes(binary)
        declared = instruction_mix.max_threads(binary.ptx)
        for kernel, resources in binary.resources.items():
            block = threads or declared.get(kernel, DEFAULT_THREADS)
            reports.append(_report(kernel, source.name, "CUDA C++", arch, binary, resources, block, mixes[kernel]))
    return sorted(reports, key=lambda r: _place_in(source, r.kernel))


def report_triton(
    builds: Sequence[TritonBuild], archs: Sequence[str] = ARCHS, *, source: str = ""
) -> list[KernelReport]:
    """Reports Triton builds; shared memory is what the launch asks for, since Triton's is dynamic."""
    reports = []
    for build in builds:
        for arch in archs:
            binary, shared = compile_triton(build, arch)
            (kernel, resources), mixes = next(iter(binary.resources.items())), _mixes(binary)
            resources = Resources(
                resources.registers,
                resources.spill_store_bytes,
                resources.spill_load_bytes,
                resources.stack_bytes,
                shared,
            )
            threads = instruction_mix.max_threads(binary.ptx).get(kernel, 32 * build.num_warps)
            reports.append(_report(build.label, source, "Triton", arch, binary, resources, threads, mixes[kernel]))
    return reports


def _mixes(binary: Binary) -> dict[str, InstructionMix]:
    listing = disassemble(binary)
    return instruction_mix.from_sass(listing) if listing else instruction_mix.from_ptx(binary.ptx)


def _report(
    kernel: str,
    source: str,
    language: str,
    arch: str,
    binary: Binary,
    resources: Resources,
    threads: int,
    mix: InstructionMix,
) -> KernelReport:
    resident = occupancy(arch, threads=threads, registers=resources.registers, shared_bytes=resources.shared_bytes)
    return KernelReport(
        kernel,
        source,
        language,
        arch,
        binary.compiler,
        threads,
        resources.registers,
        resources.spill_store_bytes,
        resources.spill_load_bytes,
        resources.shared_bytes,
        resident,
        mix,
    )


def _place_in(source: Path, kernel: str) -> int:
    """Ladders are read in the order of their file, not in that of the compiler."""
    places = [match.start() for match in re.finditer(rf"\b{re.escape(kernel)}\s*\(", source.read_text())]
    return places[-1] if places else 0
