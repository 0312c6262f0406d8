"""Benchmark case `tune`: which tiles of the paged kernel are fastest on this GPU, for the table in kernels/tiles.py."""

from __future__ import annotations

from dataclasses import dataclass

from module0_profiling.bench import Options
from module0_profiling.results import Figure
from phase3_paged_attention.measures.attention_inputs import Case, decode, extend
from phase3_paged_attention.measures.attention_steps import ours
from phase3_paged_attention.measures.attention_timing import NOTHING, OURS_ALONE, Prepare, timed
from phase3_paged_attention.measures.gpu_cases import DRY, DRY_HEADS, LONG, bench_of

# (block_n, warps, stages, blocks). Of `stages` tiles all but one are on their way. Work is split for so many `blocks`
# on an SM; how many fit is up to the build.
SHORT = (
    *((64, 4, stages, blocks) for stages in (2, 3, 4) for blocks in (2, 3, 4)),
    *((32, 4, 3, 4), (32, 4, 4, 4), (32, 4, 5, 4), (128, 4, 2, 2), (128, 4, 3, 2), (128, 8, 3, 1), (64, 8, 3, 2)),
    *((64, 2, 3, 4), (64, 4, 2, 5), (64, 4, 3, 6), (64, 4, 3, 8)),
)
TALL = (
    *((32, 4, 3, 1), (64, 4, 2, 1), (64, 4, 3, 1), (128, 8, 2, 1), (128, 8, 3, 1)),
    *((64, 8, stages, 1) for stages in (2, 3, 4)),
)


@dataclass(frozen=True)
class Search:
    """Tiles to try, (block_n, warps, stages, blocks), with tiles of so many new tokens."""

    label: str
    case: Case
    tiles: tuple[tuple[int, int, int, int], ...]
    tokens: tuple[int, ...] = (1,)


SEARCHES = (
    Search("decode", decode(64, LONG), SHORT),
    Search("prefill", extend(1, LONG, LONG), TALL, (16, 32)),
    Search("decode fp8", decode(64, LONG, kv_format="fp8_e4m3"), SHORT),
    Search("decode 64", decode(64, LONG, (32, 8, 64)), SHORT),
    Search("decode per token", decode(64, LONG, kv_format="fp8_per_token_head"), SHORT),
    Search("prefill 64", extend(1, LONG, LONG, (32, 8, 64)), TALL, (16, 32)),
)
DRY_SEARCHES = (Search("decode", decode(1, 21, DRY_HEADS, **DRY), ((16, 4, 1, 1), (32, 4, 1, 2))),)


def tune(options: Options) -> tuple[Figure, ...]:
    """Microseconds of each tile, in turns, and the best; a tile that does not fit the GPU is listed as not measured."""
    from phase3_paged_attention.kernels.tiles import Tile

    bench, figures = bench_of(options), []
    searches = {search.case: search for search in (DRY_SEARCHES if bench.dry else SEARCHES)}
    for case in bench.affordable(searches):
        search = searches[case]
        tried: dict[str, Prepare] = {}
        for block_n, warps, stages, blocks in search.tiles:
            for tokens in search.tokens:
                name = f"{tokens} x {block_n}, {warps} warps, {stages} stages, {blocks} blocks"
                tried[name] = _with(Tile(block_n, warps, stages, blocks), tokens)
        timings = timed(case, bench, must=NOTHING, may={**OURS_ALONE, **tried}).timings
        figures += [
            Figure(f"{search.label}/{name}", 1e6 * one.median, "us", one.spread) for name, one in timings.items()
        ]
        best = min(timings, key=lambda name: timings[name].median)
        figures.append(Figure(f"{search.label}/best", 1e6 * timings[best].median, "us", note=best))
    return (*figures, *bench.not_measured())


def _with(tile: object, tokens: int) -> Prepare:
    return lambda inputs: ours(inputs, tile=tile, tokens=tokens)
