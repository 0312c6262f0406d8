"""Benchmark case `counts`: what each version of rope.cu moves for a token, seen access by access in the emulation."""

from __future__ import annotations

from module0_profiling.bench import Options
from module0_profiling.results import Figure
from phase0_prototype.kernels import ladder
from phase2_rope.kernels import counts, rope
from phase2_rope.kernels.counts import Case


def counted(options: Options) -> tuple[Figure, ...]:
    """Bytes in whole sectors, over the fewest possible, and global memory instructions of a warp; 8 + 2 heads of 128.

    Raises:
        MissingTool: no C++ compiler is here.
    """
    case, figures = Case(), []
    for version in ladder.read(rope.SOURCE):
        moved = counts.emulate(rope.SOURCE, version.name, case, many_tokens=True).moved / case.tokens
        figures += [
            Figure(f"{version.name}/bytes a token", moved, "B"),
            Figure(f"{version.name}/predicted", counts.predicted_bytes(version.name, case) / case.tokens, "B"),
            Figure(f"{version.name}/over the minimum", counts.overhead(rope.SOURCE, version.name, case), "x"),
            Figure(f"{version.name}/requests a token", counts.requests_per_token(rope.SOURCE, version.name, case), ""),
        ]
    return tuple(figures)
