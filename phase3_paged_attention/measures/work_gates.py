"""What the gates ask of a planned list of work: does anybody wait, and do its sizes depend on lengths?

Arithmetic at the sizes of a GPU: 132 SMs, three programs on each, 8 KV heads.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from types import ModuleType

import torch

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use, resolve
from phase3_paged_attention.measures.attention_inputs import zipf_lengths
from phase3_paged_attention.work_list import Work

ROOM = __name__.partition(".")[0]
PROGRAMS, KV_HEADS, BLOCK_N = 132 * 3, 8, 64
STEPS = {
    "32 sequences of 32,768 / rank tokens": zipf_lengths(32, 32768),
    "one sequence of 32,768 tokens": (32768,),
}


def waiting(use: Use) -> Measured:
    """Tokens that pass until the last program is done, over an even share; the worse of two steps of decodes."""
    planner, worst, said = resolve(ROOM, "work", use), 0.0, ""
    for name, lengths in STEPS.items():
        found = rounds(_planned(planner, lengths)) / even_share(lengths)
        if found > worst:
            worst, said = found, name
    return Measured(worst, said)


def shapes(use: Use) -> Measured:
    """Different launches that 16 steps of 8 decodes need where lists have a fixed length: a CUDA graph for each."""
    planner, seen = resolve(ROOM, "work", use), set()
    generator = torch.Generator().manual_seed(0)
    capacity = 8 + -(-PROGRAMS // KV_HEADS)
    for step in range(16):
        longest = 64 << step % 12
        lengths = torch.randint(1, longest + 1, (8,), generator=generator).tolist()
        work = _planned(planner, lengths, capacity)
        seen.add((*work.items.shape, *work.merges.shape, *work.counters.shape, work.slots))
    return Measured(float(len(seen)), f"lists of {sorted({shape[0] for shape in seen})} rows")


def rounds(work: Work) -> int:
    """Cached tokens that the busiest program reads, where the next item is the first free program's."""
    free = [0] * PROGRAMS
    for begin, end in work.items[work.items[:, 0] >= 0][:, 2:4].tolist():
        for _ in range(KV_HEADS):
            heapq.heapreplace(free, free[0] + end - begin)
    return max(free)


def even_share(lengths: Sequence[int]) -> float:
    """Tokens of a program, if all were done at the same time."""
    return sum(lengths) * KV_HEADS / PROGRAMS


def _planned(planner: ModuleType, lengths: Sequence[int], capacity: int | None = None) -> Work:
    work: Work = planner.plan_work(
        [1] * len(lengths), lengths, group=4, kv_heads=KV_HEADS, window=None, programs=PROGRAMS, block_n=BLOCK_N,
        tokens=1, capacity=capacity, device=torch.device("cpu"),
    )  # fmt: skip
    return work
