"""What bounds a kernel, from its hardware counters, with the evidence and what to try next.

Busy means 60 % of a peak, the threshold that Nsight Compute's own Speed Of Light rule uses. A kernel that keeps
neither the memory system nor the SMs busy waits: for its own launch, for blocks that the grid does not have (less than
one wave, or a last wave that is nearly empty), or for latency that too few warps hide. Whichever it is, a faster memory
or more arithmetic would not help it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from module0_profiling.ncu import KernelCounters

BUSY = 60.0  # percent of a peak
SHORT = 5e-6  # seconds; launching a kernel takes about as long
LAST_WAVE = 0.8  # share of the slots that all waves together must fill
FEW_WARPS = 50.0  # percent of the warp slots
COALESCED = 80.0  # percent of the bytes of a sector that somebody asked for
WIDEST = 16.0  # sectors of a request in which every lane reads 16 neighbouring bytes
CONFLICTS = 0.1  # share of the passes over shared memory
IDLE_TENSOR_CORES = 5.0  # percent


@dataclass(frozen=True)
class Verdict:
    """What bounds one launch.

    Attributes:
        bound: "memory-bound", "compute-bound", "latency-bound", "launch-bound", "grid-bound", "tail-bound" or
            "unknown".
        evidence: sentences with the numbers that say so.
        to_try: what to change next, most promising first.
        lacked: metrics that were not taken and could have changed the verdict or sharpened it.
    """

    bound: str
    evidence: tuple[str, ...]
    to_try: tuple[str, ...]
    lacked: tuple[str, ...]


def judge(counters: KernelCounters) -> Verdict:
    """The verdict of one launch; metrics that are missing are listed, never guessed."""
    memory = _largest(counters.dram_percent, counters.memory_percent)
    if memory is None or counters.sm_percent is None:
        taken = f"only {len(counters.metrics)} metrics were taken: the busy share of memory or of the SMs is missing"
        return Verdict("unknown", (taken,), ("take them with the line of `titan ncu-command`",), _lacked(counters))
    bound = _bound(counters, memory, counters.sm_percent)
    evidence, to_try = _EXPLAIN[bound](counters)
    more_evidence, more_to_try = _access_patterns(counters)
    return Verdict(bound, (*evidence, *more_evidence), (*to_try, *more_to_try), _lacked(counters))


def _bound(c: KernelCounters, memory: float, sm: float) -> str:
    if max(memory, sm) >= BUSY:
        return "memory-bound" if memory >= sm else "compute-bound"
    if c.seconds is not None and c.seconds < SHORT:
        return "launch-bound"
    if c.waves is not None and c.waves < 1:
        return "grid-bound"
    if c.waves is not None and c.waves / math.ceil(c.waves) < LAST_WAVE:
        return "tail-bound"
    return "latency-bound"


Explanation = tuple[list[str], list[str]]


def _memory(c: KernelCounters) -> Explanation:
    dram, any_level = c.dram_percent, c.memory_percent
    rate = f" ({c.dram_bytes_per_second / 1e9:.0f} GB/s)" if c.dram_bytes_per_second is not None else ""
    if dram is not None and dram >= BUSY:
        evidence = [f"DRAM is {dram:.0f} % busy{rate}, the SMs {c.sm_percent:.0f} %"]
        return evidence, ["move fewer bytes: fuse with a neighbour, a narrower dtype, reuse in shared memory"]
    where = "DRAM was not counted" if dram is None else f"DRAM is only {dram:.0f} % busy{rate}"
    evidence = [
        f"the memory system is {any_level or dram:.0f} % busy and {where}: the limit is L1, shared memory or L2"
    ]
    return evidence, ["fewer and wider accesses: 128-bit vectors, more results a thread from what it has read"]


def _compute(c: KernelCounters) -> Explanation:
    evidence = [f"the SMs are {c.sm_percent:.0f} % busy, DRAM {_percent(c.dram_percent)}"]
    if c.tensor_percent is None:
        return evidence, ["do less arithmetic, or move it to the tensor cores if it is a matrix product"]
    evidence.append(f"tensor cores are {c.tensor_percent:.0f} % busy")
    if c.tensor_percent < IDLE_TENSOR_CORES:
        return evidence, [
            "if it is a matrix product, use the tensor cores (16-bit inputs, or TF32); else a cheaper formula"
        ]
    return evidence, ["a narrower dtype (FP8), or larger tiles so that more of the instructions are matrix products"]


def _latency(c: KernelCounters) -> Explanation:
    evidence = [
        f"neither is busy: memory {_percent(_largest(c.dram_percent, c.memory_percent))}, SMs {c.sm_percent:.0f} %"
    ]
    achieved, possible = c.achieved_occupancy, c.theoretical_occupancy
    if achieved is None:
        return evidence, ["take occupancy too, then choose between more warps and more independent work a thread"]
    evidence.append(f"{achieved:.0f} % of the warp slots were in use" + _possible(c))
    if achieved >= FEW_WARPS:
        return evidence, ["more independent loads and sums a thread (unroll, prefetch with cp.async), fewer barriers"]
    if possible is not None and possible < FEW_WARPS:
        remedy = {
            "registers": "fewer registers a thread (smaller tile, __launch_bounds__)",
            "shared memory": "less shared memory a block (smaller tile, fewer stages)",
            "blocks": "larger blocks",
            "warps": "blocks whose warps divide the slots",
        }
        limiter = (c.occupancy_limiter or "").split(" and ")[0]
        return evidence, [remedy.get(limiter, "a smaller block"), "or more independent work a thread at few warps"]
    return evidence, ["more blocks, or blocks of more even length: the slots are there and stay empty"]


def _launch(c: KernelCounters) -> Explanation:
    evidence = []
    if c.seconds is not None:
        evidence.append(f"it ran {c.seconds * 1e6:.1f} us; a launch costs about {SHORT * 1e6:.0f} us")
    return evidence, ["fuse it with its neighbours, or replay it in a CUDA graph"]


def _grid(c: KernelCounters) -> Explanation:
    """A wave counts the blocks that fit at once: below one, slots are empty, though each SM may have a block."""
    waves = c.waves or 0.0
    evidence = [f"its grid of {waves:.2f} waves leaves {1 - waves:.0%} of the block slots empty"]
    return evidence, [
        "split the work finer (split-K, split-KV), or run it beside another kernel",
        "where each SM has its block already (a persistent kernel): more independent work a thread",
    ]


def _tail(c: KernelCounters) -> Explanation:
    waves = c.waves or 0.0
    idle = 1 - waves / math.ceil(waves)
    evidence = [f"{waves:.2f} waves take as long as {math.ceil(waves)}: {idle:.0%} of the slots stay empty"]
    return evidence, ["a tile that makes the waves nearly whole, or a persistent kernel of as many blocks as fit"]


_EXPLAIN = {
    "memory-bound": _memory,
    "compute-bound": _compute,
    "latency-bound": _latency,
    "launch-bound": _launch,
    "grid-bound": _grid,
    "tail-bound": _tail,
}


def _access_patterns(c: KernelCounters) -> Explanation:
    """What is wasteful whatever bounds the kernel: uncoalesced accesses and bank conflicts."""
    evidence, to_try = [], []
    for what, efficiency, sectors in (
        ("loads", c.load_efficiency, c.sectors_per_load),
        ("stores", c.store_efficiency, c.sectors_per_store),
    ):
        if efficiency is not None and efficiency < COALESCED:
            evidence.append(f"global {what} use {efficiency:.0f} % of the bytes that they move")
        elif efficiency is None and sectors is not None and sectors > WIDEST:
            evidence.append(f"global {what} touch {sectors:.1f} sectors a request, 4 to 16 are coalesced")
        else:
            continue
        to_try.append(f"coalesce the {what}: neighbouring lanes at neighbouring addresses, a tile in shared memory")
    if c.conflict_share is not None and c.conflict_share > CONFLICTS:
        evidence.append(f"{c.conflict_share:.0%} of the passes over shared memory are bank conflicts")
        to_try.append("pad or swizzle the tile in shared memory")
    return evidence, to_try


def _lacked(c: KernelCounters) -> tuple[str, ...]:
    values = {
        "duration": c.seconds,
        "DRAM busy share": c.dram_percent,
        "SM busy share": c.sm_percent,
        "tensor core busy share": c.tensor_percent,
        "waves": c.waves,
        "achieved occupancy": c.achieved_occupancy,
        "sectors per load": _largest(c.sectors_per_load, c.load_efficiency),
        "bank conflicts": c.bank_conflicts,
    }
    return tuple(name for name, value in values.items() if value is None)


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _percent(value: float | None) -> str:
    return "not counted" if value is None else f"{value:.0f} %"


def _possible(c: KernelCounters) -> str:
    if c.theoretical_occupancy is None:
        return ""
    by = f", limited by {c.occupancy_limiter}" if c.occupancy_limiter and c.theoretical_occupancy < 100 else ""
    return f" of {c.theoretical_occupancy:.0f} % possible{by}"
