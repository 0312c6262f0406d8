"""Benchmark cases of the decode ladder that need no GPU: what the rungs compile to, and the bytes that they ask for.

Each compiles, or interprets, in a process of its own: Triton decides when it is imported which of the two it does.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from module0_profiling import elsewhere
from module0_profiling.bench import Options
from module0_profiling.gpu_tools import CompileError
from module0_profiling.results import Figure
from module0_profiling.static_report import report_triton
from phase3_paged_attention.kernels import costs
from phase3_paged_attention.kernels.costs import Decode

ARCHS = ("sm_90", "sm_80", "sm_120")
DIMS = (128, 64)
TOKENS = (16, 64, 128)  # of the tiles of `tiled`
WORKERS = 2
LARGE = Decode.even(64, 8192, 32, 8, 128)  # a full batch of an 8B model
FEW_LONG = Decode.even(1, 131072, 32, 8, 128)
TRACED = Decode((150, 70, 7), 8, 2, 64)  # ragged, small enough to interpret
SPLITS, BLOCK_N = 4, 32  # of `split` where it is traced


def ladder_static(options: Options) -> tuple[Figure, ...]:
    """Of each rung and architecture: registers, spills, shared memory, blocks on an SM, copies, widths of loads."""
    archs = ARCHS[:1] if options.dry else ARCHS
    flags = ("--dry",) if options.dry else ()
    with options.console.status(f"compiling for {', '.join(archs)}"), ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(lambda arch: elsewhere.figures(__name__, "static", arch, *flags), archs))
    return tuple(figure for part in parts for figure in part)


def ladder_bytes(options: Options) -> tuple[Figure, ...]:
    """Bytes a cached token that each rung asks for: by its own addresses, by the model, and over what must be read."""
    with options.console.status("tracing the ladder"):
        traced = elsewhere.figures(__name__, "bytes", interpret=True)
    return (*traced, *_modelled("batch 64 of 8k", LARGE), *_modelled("one sequence of 128k", FEW_LONG))


def compiled(arch: str, *, dry: bool) -> list[Figure]:
    """Figures of all builds for `arch`; of one head dimension in a dry run. Raises MissingTool."""
    from phase3_paged_attention.kernels import decode_ladder as ladder
    from phase3_paged_attention.kernels.decode_ladder import Tile

    figures: list[Figure] = []
    for dim in DIMS[:1] if dry else DIMS:
        builds = {rung: ladder.build(rung, dim) for rung in (*ladder.RUNGS, *ladder.EXHIBITS)}
        if not dry:
            tile = ladder.TILES["tiled"]
            sizes = {f"tiled {n}": Tile(n, tile.warps, tile.stages) for n in TOKENS}
            builds |= {name: ladder.build("tiled", dim, size) for name, size in sizes.items()}
        for name, build in {**builds, "merge": ladder.build_merge(dim)}.items():
            row = f"{name}, D {dim}, {arch}"
            try:
                (report,) = report_triton([build], (arch,))
            except CompileError as error:
                figures.append(Figure(f"{row}/blocks on an SM", 0, "", note=str(error)[:160]))
                continue
            resident, mix = report.occupancy, report.mix
            scalar = sum(loads for bits, (loads, _) in mix.global_widths.items() if bits < 32)
            figures += [
                Figure(f"{row}/registers", report.registers, "", note=f"{build.num_warps} warps"),
                Figure(f"{row}/spills", report.spill_bytes, "B"),
                Figure(f"{row}/shared memory", report.shared_bytes, "B"),
                Figure(f"{row}/blocks on an SM", resident.blocks, "", note=f"limit: {resident.limiter}"),
                Figure(f"{row}/cp.async", mix.async_copies, "", note="instructions, a loop body once"),
                Figure(f"{row}/16-byte loads", mix.vector_loads, "", note="copies with them"),
                Figure(f"{row}/loads below 4 bytes", scalar, ""),
            ]
    return figures


def traced(case: Decode) -> list[Figure]:
    """Run every rung in the interpreter and count its own addresses."""
    from phase3_paged_attention.kernels import decode_ladder as ladder
    from phase3_paged_attention.kernels.trace import Trace

    q, (keys, values), lengths, tables = inputs(case)
    must, tokens = costs.minimum(case), case.tokens
    row = f"traced {', '.join(map(str, case.lengths))} tokens"
    figures = [Figure(f"{row}/minimum", must / tokens, "B/token")]
    for rung in ladder.RUNGS:
        with Trace({"q": q, "keys": keys, "values": values, "lengths": lengths, "tables": tables}) as trace:
            ladder.run(rung, q, keys, values, lengths, tables, case.dim**-0.5, block_n=BLOCK_N, splits=SPLITS)
        model = sum(costs.requested(rung, case, splits=SPLITS, block_n=BLOCK_N).values())
        cached = trace.loads("keys", "values")
        figures += [
            Figure(f"{row}/{rung}", trace.bytes() / tokens, "B/token", note="asked for, all tensors"),
            Figure(f"{row}/{rung} by the model", model / tokens, "B/token"),
            Figure(f"{row}/{rung} over the minimum", trace.bytes() / must, "x"),
            Figure(f"{row}/{rung} keys and values", cached.requested / (2 * case.cached), "x", note="over once each"),
            Figure(f"{row}/{rung} distinct", cached.distinct / (2 * case.cached), "x", note="with a perfect cache"),
        ]
    return [*figures, *_torch(row, case)]


def _modelled(row: str, case: Decode) -> list[Figure]:
    """Figures of the cost model at sizes that nobody interprets."""
    from phase3_paged_attention.kernels.decode_ladder import RUNGS, TILES, splits_of

    must, block_n = costs.minimum(case), TILES["split"].block_n
    splits = splits_of(case.batch, case.kv_heads, max(case.lengths), block_n)
    figures = [Figure(f"{row}/minimum", must / case.tokens, "B/token")]
    for rung in RUNGS:
        asked = sum(costs.requested(rung, case, splits=splits, block_n=block_n).values())
        note = f"{splits} splits" if rung == "split" else ""
        figures.append(Figure(f"{row}/{rung}", asked / case.tokens, "B/token", note=note))
        figures.append(Figure(f"{row}/{rung} over the minimum", asked / must, "x", note=note))
    return [*figures, *_torch(row, case)]


def _torch(row: str, case: Decode) -> list[Figure]:
    must, figures = costs.minimum(case), []
    for name, operations in (("PyTorch unfused", costs.unfused(case)), ("gather + SDPA", costs.gathered_sdpa(case))):
        moved, note = costs.total(operations), f"{len(operations)} operations"
        figures.append(Figure(f"{row}/{name}", moved / case.tokens, "B/token", note=note))
        figures.append(Figure(f"{row}/{name} over the minimum", moved / must, "x", note=note))
    return figures


def inputs(case: Decode) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, keys and values, lengths, tables of pages in no order; float16 stands for bfloat16, which is as wide."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    pages = case.gathered // case.page
    blocks = case.batch * pages
    q = torch.randn(case.batch, case.heads, case.dim, generator=generator).half()
    cache = torch.randn(2, blocks, case.page, case.kv_heads, case.dim, generator=generator).half()
    tables = torch.randperm(blocks, generator=generator).view(case.batch, pages).int()
    return q, cache, torch.tensor(case.lengths, dtype=torch.int32), tables


def _main(what: str, *arguments: str) -> None:
    elsewhere.say(lambda: traced(TRACED) if what == "bytes" else compiled(arguments[0], dry="--dry" in arguments))


if __name__ == "__main__":
    _main(*sys.argv[1:])
