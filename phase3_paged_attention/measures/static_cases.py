"""Benchmark case `static`: what the kernels of this phase cost on each GPU, read from their compiled form."""

from __future__ import annotations

from collections.abc import Iterator

from module0_profiling.bench import Options
from module0_profiling.results import Figure
from module0_profiling.static_report import ALL_ARCHS, KernelReport, report_triton
from module0_profiling.triton_compile import TritonBuild

HEADS = (64, 8)  # Hq, Hkv: groups of 8
CONVERTS_FP8 = (8, 9)  # the first GPUs that do


def static(options: Options) -> tuple[Figure, ...]:
    """Registers, spills, shared memory and occupancy of what each of six architectures launches, in bfloat16."""
    archs = ALL_ARCHS[3:4] if options.dry else ALL_ARCHS
    found = (report for arch in archs for report in report_triton(builds(arch), (arch,)))
    return tuple(figure for report in found for figure in figures_of(report))


def builds(arch: str) -> tuple[TritonBuild, ...]:
    """The paged family with the tiles that this GPU is given, latents, the quantised write, and the decode ladder."""
    from phase3_paged_attention.kernels import decode_ladder, latents_triton, merge, quantise_triton

    number = int(arch.removeprefix("sm_"))
    capability = (number // 10, number % 10)
    writes = quantise_triton.CONVERTING if capability >= CONVERTS_FP8 else quantise_triton.AOT
    merging = merge.build(*HEADS, 128, 1, 16)
    return (*_family(capability), merging, *latents_triton.builds_for(capability), *writes, *decode_ladder.AOT)


def figures_of(report: KernelReport) -> list[Figure]:
    """Of one build on one architecture; the first part of a name is a row of a table."""
    row = f"{report.kernel.replace('/', '+')}, {report.arch}"
    return [
        Figure(f"{row}/registers", report.registers, "", note=report.compiler),
        Figure(f"{row}/spills", report.spill_bytes, "B"),
        Figure(f"{row}/shared memory", report.shared_bytes, "B"),
        Figure(f"{row}/occupancy", 100 * report.occupancy.fraction, "%", note=f"limited by {report.occupancy.limiter}"),
    ]


def _family(capability: tuple[int, int]) -> Iterator[TritonBuild]:
    from phase3_paged_attention.kernels.paged import PER_TENSOR, PER_TOKEN, PLAIN, block_m_of
    from phase3_paged_attention.kernels.paged_builds import build
    from phase3_paged_attention.kernels.tiles import tile_of

    group = HEADS[0] // HEADS[1]
    for dim in (64, 128):
        for tokens in (1, 16):
            for stored, scales in ((0, PLAIN), (1, PER_TENSOR), (1, PER_TOKEN)):
                tile = tile_of(capability, dim, block_m_of(tokens, group), 1 if stored else 2)
                yield build(*HEADS, dim, tokens, tile, stored=stored, scales=scales, last_block=tokens == 1)
