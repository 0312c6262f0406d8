"""Benchmark cases of the RoPE kernels: static facts, which need no GPU, and times beside the peers, which need one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from module0_profiling.results import Figure
from module0_profiling.timing import Clock, Timing, clock_for, graph_clock, interleave, ratio, rotated
from phase0_prototype.kernels import ladder
from phase2_rope.kernels import counts, rope
from phase2_rope.kernels.counts import Case, Inputs
from phase2_rope.rope_peers import PEERS, Peer

TOKENS = (1, 16, 64, 256, 4096, 65536)
SHAPES = ((32, 8, 64), (32, 8, 128), (64, 8, 128))  # q heads, kv heads, dim
MACRO = "SCALAR_BF16"
PAGE = 16
POSITIONS = 8192
CACHES = 3  # inputs together are this many times the L2 cache, if ten of them can be
CALLS = 10  # of a replayed graph
TWO = "rope_tokens, kv_write"
Subjects = dict[str, Callable[[], object]]


def static() -> tuple[Figure, ...]:
    """Registers, spills, shared memory and occupancy of every kernel and Triton build in bfloat16, six architectures.

    Raises:
        MissingTool: neither NVRTC nor nvcc is here.
    """
    from module0_profiling.static_report import ALL_ARCHS, report_cuda, report_triton

    reports = report_cuda(rope.SOURCE, ALL_ARCHS, defines=(MACRO,))
    if importlib.util.find_spec("triton") is not None:
        from phase2_rope.kernels import rope_triton

        reports += report_triton(rope_triton.AOT, ALL_ARCHS)
    figures: list[Figure] = []
    for r in reports:
        row = f"{r.kernel}, {r.arch}"
        figures += [
            Figure(f"{row}/registers", r.registers, "", note=r.compiler),
            Figure(f"{row}/spills", r.spill_bytes, "B"),
            Figure(f"{row}/shared memory", r.shared_bytes, "B"),
            Figure(f"{row}/occupancy", 100 * r.occupancy.fraction, "%", note=f"limited by {r.occupancy.limiter}"),
        ]
    return tuple(figures)


def timed(device: str = "cuda", rounds: int = 7, *, dry: bool = False) -> tuple[Figure, ...]:
    """Every version, Triton and the peers in turns: time, GB/s over the minimum, share of a copy in the same run.

    Inputs take turns, so that from about 4,096 tokens on none is in the L2 cache; for few tokens all are, as in an
    engine, where the product before has just written them. `dry` goes the same way with tiny sizes in the emulation
    and Triton's interpreter (float16); the figures mean nothing.
    """
    copy = copy_rate(device, dry=dry)
    figures = [Figure("copy", copy / 1e9, "GB/s")]
    missing = {peer.name: why for peer in PEERS if (why := peer.why_not())}
    for q_heads, k_heads, dim in ((2, 1, 16),) if dry else SHAPES:
        for tokens in (3,) if dry else TOKENS:
            dtype = torch.float16 if dry else torch.bfloat16
            case = Case(tokens, q_heads, k_heads, dim, dim, dtype=dtype)
            clock = clock_for(device) if dry else graph_clock(device, CALLS)
            found = subjects(case, device, [peer for peer in PEERS if peer.name not in missing])
            timings = interleave(_runnable(found, clock, missing), rounds=rounds, device=device, clock=clock)
            figures += _figures(case, timings, copy)
            del found, timings, clock  # graphs and inputs of a shape make room for the next
    figures += [Figure(f"not measured/{name}", 0, "", note=why) for name, why in missing.items()]
    return tuple(figures)


def subjects(case: Case, device: str, peers: Sequence[Peer], source: Path = rope.SOURCE) -> Subjects:
    """What is timed on the inputs of a case, each on several of them in turn."""
    inputs = [big_inputs(case, device) for _ in range(_copies(case, device))]
    found: Subjects = {}
    for version in ladder.read(source):
        if version.name != "kv_write":
            found[version.name] = _in_turn([_launch(version.name, one, source) for one in inputs])
    turns, writes = ([_launch(name, one, source) for one in inputs] for name in TWO.split(", "))
    found[TWO] = _in_turn([partial(_both, turn, write) for turn, write in zip(turns, writes, strict=True)])
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = rotated(_triton_turn, inputs)
        found["triton, write"] = rotated(_triton_write, inputs)
    for peer in peers:
        found[peer.name] = _in_turn([peer.prepare(one) for one in inputs])
    return found


def big_inputs(case: Case, device: str) -> Inputs:
    """Random inputs made on the device; q, k and v are slices of one activation, slots a random permutation."""
    heads = case.q_heads + 2 * case.k_heads
    x = torch.randn(case.tokens, heads, case.dim, device=device, dtype=case.dtype)
    blocks = -(-case.tokens // PAGE)
    slot = torch.randperm(blocks * PAGE, device=device)[: case.tokens]
    keys = torch.zeros(blocks, PAGE, case.k_heads, case.dim, device=device, dtype=case.dtype)
    table = counts.cos_sin_table(POSITIONS, case.rotated).to(device)
    positions = torch.randint(0, POSITIONS, (case.tokens,), device=device)
    return Inputs(x, table, positions, (slot // PAGE, slot % PAGE), keys, torch.zeros_like(keys), case)


def copy_rate(device: str, *, dry: bool = False) -> float:
    """Bytes per second, read and written, of a large copy."""
    from module0_profiling.peak_measure import copy_bandwidth

    buffer = torch.empty((1 << 20) if dry else (2 << 30), dtype=torch.uint8, device=device).fill_(1)
    return copy_bandwidth(buffer, clock_for(device), 0.01 if dry else 0.25)


def against_copy(source: Path, version: str, tokens: int = 65536) -> float:
    """Bytes per second of a version over those of a copy, in one run on a GPU: 32 + 8 heads of 128, bfloat16."""
    case = Case(tokens, 32, 8, 128, 128)
    found = subjects(case, "cuda", (), source)
    timing = interleave({version: found[version]}, device="cuda", clock=graph_clock("cuda", CALLS))[version]
    return counts.minimum_bytes(version, case) / timing.median / copy_rate("cuda")


def two_launches_over_one(source: Path, tokens: int = 256) -> float:
    """Time of turning and writing in two launches over that in one, on a GPU: 32 + 8 heads of 128, bfloat16."""
    found = subjects(Case(tokens, 32, 8, 128, 128), "cuda", (), source)
    pair = {name: found[name] for name in (TWO, "rope_fast")}
    timings = interleave(pair, device="cuda", clock=graph_clock("cuda", CALLS))
    return ratio(timings[TWO], timings["rope_fast"])


def ncu_command() -> str:
    """The command that measures what only the hardware knows: bandwidth, sectors for a request, warps at work."""
    from phase0_prototype.kernels.harness import ncu_of

    return ncu_of(rope.SOURCE, "-m phase2_rope.benchmark rope --no-record --rounds 1")


def _figures(case: Case, timings: dict[str, Timing], copy: float) -> list[Figure]:
    row = f"{case.tokens} tokens, {case.q_heads}+{case.k_heads}x{case.dim}"
    figures = []
    for name, timing in timings.items():
        writes = name in ("rope_fast", TWO, "triton, write", "FlashInfer, append")
        rate = counts.minimum_bytes("rope_fast" if writes else "rope_tokens", case) / timing.median
        figures += [
            Figure(f"{row}/{name}, time", timing.median * 1e6, "us", timing.spread),
            Figure(f"{row}/{name}, bandwidth", rate / 1e9, "GB/s", timing.spread),
            Figure(f"{row}/{name}, share of copy", 100 * rate / copy, "%"),
        ]
        others = (TWO, "FlashInfer, append") if writes else ("vLLM", "FlashInfer")
        figures += [
            Figure(f"{row}/{name}, x {other}", ratio(timings[other], timing), "x")
            for other in others
            if other in timings and other != name
        ]
    return figures


def _runnable(found: Subjects, clock: Clock, missing: dict[str, str]) -> Subjects:
    """Those that run: a peer that fails (in a graph, say) becomes one that is not measured."""
    names = {peer.name for peer in PEERS}
    kept: Subjects = {}
    for name, subject in found.items():
        try:
            clock(subject)
        except Exception as error:
            if name not in names:
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            kept[name] = subject
    return kept


def _copies(case: Case, device: str) -> int:
    if not device.startswith("cuda"):
        return 2
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)
    return max(1, min(CALLS, -(-CACHES * l2 // counts.minimum_bytes("rope_tokens", case))))


def _launch(version: str, inputs: Inputs, source: Path) -> Callable[[], None]:
    in_place = replace(inputs, case=replace(inputs.case, in_place=True))
    return rope.prepare(version, counts.prepared(version, in_place)[0], source=source)


def _both(turn: Callable[[], None], write: Callable[[], None]) -> None:
    turn()
    write()


def _in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    return rotated(lambda function: function(), functions)


def _triton_turn(inputs: Inputs) -> None:
    from phase2_rope.kernels import rope_triton

    q, k, _ = inputs.qkv
    rope_triton.rotate(q, k, inputs.cos_sin, inputs.positions, interleaved=inputs.case.interleaved)


def _triton_write(inputs: Inputs) -> None:
    from phase2_rope.kernels import rope_triton

    where = (inputs.slots, inputs.keys, inputs.values)
    rope_triton.rotate_and_write(
        *inputs.qkv, inputs.cos_sin, inputs.positions, *where, interleaved=inputs.case.interleaved
    )
