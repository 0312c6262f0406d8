"""Benchmark case of the latent kernel without a GPU: what its tiles compile to, and the arithmetic of its cache.

Figures of a build are what ptxas and Triton say of it. Those of a token are arithmetic on DeepSeek-V3's sizes.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from module0_profiling import elsewhere
from module0_profiling.bench import Options
from module0_profiling.gpu_tools import CompileError
from module0_profiling.results import Figure
from module0_profiling.static_report import ALL_ARCHS, report_triton
from phase3_paged_attention.latent_format import PackedLatents

DRY_ARCHS = ("sm_90",)
WORKERS = 2
H, L, R = 128, 512, 64  # DeepSeek-V3
H200 = 790e12, 4.3e12  # FLOP/s in bfloat16 and bytes/s that one reaches, about


def latent_tiles(options: Options) -> tuple[Figure, ...]:
    """Registers, spills, shared memory and blocks on an SM of each tile; bytes and FLOPs of a cached token.

    An architecture is compiled in a process of its own: under `--dry-run` this one interprets, and a compiler that
    crashes does not take it along.
    """
    archs = DRY_ARCHS if options.dry else ALL_ARCHS
    flags = ("--dry",) if options.dry else ()
    with options.console.status(f"compiling for {', '.join(archs)}"), ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(lambda arch: elsewhere.figures(__name__, arch, *flags), archs))
    return (*arithmetic(), *(figure for part in parts for figure in part))


def arithmetic() -> tuple[Figure, ...]:
    """What a cached token costs, and from how many heads on a decode computes longer than it reads."""
    flops = 2 * (2 * L + R)  # of a head and cached token: scores over L + R, sums over L
    rate, bandwidth = H200
    figures = []
    for name, size in (("bf16", 2 * (L + R)), ("FP8", PackedLatents(L, R).entry_bytes)):
        ridge = rate / bandwidth * size / flops
        figures += [
            Figure(f"{name}/bytes a token", size, "B"),
            Figure(f"{name}/FLOPs a byte", flops * H / size, "", note=f"{H} heads"),
            Figure(f"{name}/heads at the ridge", ridge, "", note="an H200 computes as long as it reads"),
        ]
    framework = H * 2 * (2 * L + R)  # every head loads the latent twice
    return (
        *figures,
        Figure("FLOPs a token", flops * H, "", note=f"{H} heads, padding left out"),
        Figure("framework/bytes a token", framework, "B", note="that its programs load"),
        Figure("framework/loaded over stored", framework / (2 * (L + R)), "x"),
    )


def figures_of(arch: str, dry: bool) -> list[Figure]:
    """Compile for `arch`. A build that a compiler refuses has 0 blocks and a reason; raises MissingTool."""
    from phase3_paged_attention.kernels import latents_triton

    number = int(arch.removeprefix("sm_"))
    figures: list[Figure] = []
    for build in latents_triton.AOT[1:2] if dry else latents_triton.builds_for((number // 10, number % 10)):
        row = f"{build.label.removeprefix('latents ')}, {arch}"
        try:
            (report,) = report_triton([build], (arch,))
        except CompileError as error:
            figures.append(Figure(f"{row}/blocks on an SM", 0, "", note=str(error)[:160]))
            continue
        figures += [
            Figure(f"{row}/registers", report.registers, ""),
            Figure(f"{row}/spills", report.spill_bytes, "B"),
            Figure(f"{row}/shared memory", report.shared_bytes, "B"),
            Figure(f"{row}/blocks on an SM", report.occupancy.blocks, "", note=f"limit: {report.occupancy.limiter}"),
        ]
    return figures


def _main(arch: str, *flags: str) -> None:
    elsewhere.say(lambda: figures_of(arch, "--dry" in flags))


if __name__ == "__main__":
    _main(*sys.argv[1:])
