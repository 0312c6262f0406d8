"""Benchmark case of the decode tiles of GQA and MLA: what they compile to, on four architectures, without a GPU.

Figures of a build are what ptxas and Triton say of it. Those of a kind of tile are arithmetic on its sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from module0_profiling import elsewhere
from module0_profiling.bench import Options
from module0_profiling.gpu_tools import CompileError
from module0_profiling.occupancy import limits_of
from module0_profiling.results import Figure
from module0_profiling.static_report import KernelReport, report_triton

if TYPE_CHECKING:  # Triton decides when it is imported whether it interprets: not in this process
    from phase2_rope.kernels.decode_tiles import Tile

ARCHS = ("sm_90", "sm_100", "sm_80", "sm_120")
DRY_ARCHS = ("sm_90",)
WORKERS = 2


def tiles(options: Options) -> tuple[Figure, ...]:
    """Registers, spills, shared memory and blocks on an SM of each build; bytes, FLOPs and sums of each kind of tile.

    Builds of sm_90 are in all variants, of the others in the plain one. An architecture is compiled in a process of its
    own: under `--dry-run` this one interprets, and a compiler that crashes does not take it along.
    """
    archs = DRY_ARCHS if options.dry else ARCHS
    flags = ("--dry",) if options.dry else ()
    with options.console.status(f"compiling for {', '.join(archs)}"), ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(lambda arch: elsewhere.figures(__name__, arch, *flags), archs))
    return tuple(figure for part in parts for figure in part)


def grid(arch: str, dry: bool) -> tuple[Tile, ...]:
    """The builds for `arch`; a dry run has the two of `AOT`."""
    from phase2_rope.kernels.decode_tiles import GQA_TILE, MLA_TILE, Tile

    if dry:
        return GQA_TILE, MLA_TILE
    plain = [Tile("GQA", 16, 64, 4, 3), Tile("GQA", 16, 128, 4, 2)]
    for heads, warps in ((16, 4), (32, 8), (64, 8)):
        plain += [Tile("MLA", heads, keys, warps, 2) for keys in (16, 32, 64)]
    tallest = Tile("MLA", 128, 16, 8, 2)
    if arch != "sm_90":
        return (*plain, *([tallest] if arch == "sm_100" else []))  # whose sums lie in a memory of their own
    return (
        *plain,
        Tile("GQA", 16, 64, 4, 2),
        Tile("GQA", 16, 128, 4, 3),
        tallest,
        Tile("MLA", 128, 64, 8, 2),
        *(Tile("MLA", 16, 32, 4, stages) for stages in (1, 3)),
        *(Tile("MLA", 64, 32, 8, stages) for stages in (1, 3)),
        Tile("MLA", 64, 64, 8, 3),
        Tile("MLA", 64, 32, 4, 2),
        *(Tile("MLA", *size, 2, once=False) for size in ((16, 32, 4), (64, 32, 8), (64, 64, 8))),
        *(Tile("MLA", *size, 2, padded=True) for size in ((16, 32, 4), (64, 32, 8))),
    )


def figures_of(arch: str, found: Sequence[Tile]) -> list[Figure]:
    """Compile for `arch`. A build that a compiler refuses has 0 blocks and a reason; raises MissingTool."""
    figures: list[Figure] = []
    for tile in found:
        row = f"{tile.label}, {arch}"
        try:
            (report,) = report_triton([tile.build()], (arch,))
        except CompileError as error:
            figures.append(Figure(f"{row}/blocks on an SM", 0, "", note=str(error)[:160]))
            continue
        resident = report.occupancy
        figures += [
            Figure(f"{row}/registers", report.registers, "", note=_instruction(report)),
            Figure(f"{row}/spills", report.spill_bytes, "B"),
            Figure(f"{row}/shared memory", report.shared_bytes, "B"),
            Figure(f"{row}/blocks on an SM", resident.blocks, "", note=f"limit: {resident.limiter}"),
        ]
    return figures


def arithmetic(found: Sequence[Tile]) -> list[Figure]:
    """Figures that no compiler decides: of each kind of tile, and of a token in both caches."""
    from phase2_rope.kernels.decode_tiles import BF16, HKV, D, L, R

    row, head = BF16 * (L + R), BF16 * D
    return [
        *(figure for tile in {tile.kind: tile for tile in found}.values() for figure in _of_kind(tile)),
        Figure("MLA row over a key of one GQA head", row / head, "x", note=f"{row} B, {head} B"),
        Figure("MLA row over a GQA token", row / (2 * HKV * head), "x", note=f"{HKV} KV heads: {2 * HKV * head} B"),
    ]


def _of_kind(tile: Tile) -> list[Figure]:
    from phase2_rope.kernels.decode_tiles import BF16, HKV, HQ, D, H, L, R

    if tile.cache == "GQA":
        programs, flops = HKV, 4 * D * (HQ // HKV)
        stored, loaded, held = HKV * 2 * D, 2 * D, 2 * D  # numbers of a token: in the cache, of a program, in a stage
        query = D
    else:
        programs, flops = H // tile.rows, 2 * (2 * L + R) * tile.rows
        stored, loaded = L + R, L + R + (0 if tile.once else L)
        held, query = (tile.width, tile.width) if tile.padded else (loaded, L + R)
    sums, queries = 4 * tile.rows * tile.width, BF16 * tile.rows * query
    registers = 4 * limits_of("sm_90").registers  # bytes, and as many in every architecture here
    figures = [
        Figure("programs a sequence", programs, ""),
        Figure("bytes a key", BF16 * loaded, "B", note="that one program loads"),
        Figure("loaded over stored", programs * loaded / stored, "x", note="all programs; L2 serves the repeats"),
        Figure("FLOPs a byte", flops / (BF16 * loaded), "", note="padding left out"),
        Figure("sums", sums, "B", note="float32"),
        Figure("sums in the register file", 100 * sums / registers, "%"),
        Figure("queries", queries, "B"),
    ]
    for arch in ("sm_90", "sm_80", "sm_120"):
        keys = max(0, limits_of(arch).shared_per_block - queries) // (BF16 * held)
        figures.append(Figure(f"keys that fit, {arch}", keys, "", note="all stages, beside the queries"))
    return [replace(figure, name=f"{tile.kind}/{figure.name}") for figure in figures]


def _instruction(report: KernelReport) -> str:
    """Which matrix instructions the build has: they decide where operands and sums lie."""
    counts = {"mma.sync": report.mix.mma, "wgmma": report.mix.wgmma, "tcgen05": report.mix.tcgen05}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _main(arch: str, *flags: str) -> None:
    found = grid(arch, "--dry" in flags)
    elsewhere.say(
        lambda: [*(arithmetic(found) if arch == ARCHS[0] else ()), *figures_of(arch, found)]
    )  # it has all kinds


if __name__ == "__main__":
    _main(*sys.argv[1:])
