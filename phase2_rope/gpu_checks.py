"""What must be right on a GPU before RoPE is timed there: `python -m phase2_rope.benchmark check_rope`.

The figures are errors over what float32 arithmetic and one rounding to the type allow; above 1 `CheckFailed` is raised
with one line that names the kernel and its worst case.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.results import Figure
from phase0_prototype.kernels import ladder
from phase2_rope.kernels import counts, rope
from phase2_rope.kernels.counts import Case, Inputs
from phase2_rope.rope_peers import PEERS, Peer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (  # those of the gates, real ones, many tokens, and one more token than blocks of 4 hold
    *counts.CASES,
    Case(1, 32, 8, 128, 128),
    Case(257, 32, 4, 64, 64, padding=True),
    Case(4097, 64, 8, 128, 128),
    Case(333, 128, 1, 64, 64),
)
DRY_SIZES = counts.CASES[:4]
PEER_TOLERANCE = 0.05  # of a pair's size: vLLM and Liger round cos and sin to bfloat16 first
Run = Callable[[Inputs], tuple[Tensor, ...]]


def check(device: str, *, dry: bool = False) -> tuple[Figure, ...]:
    """Every version, the Triton twin and every peer that is here, against float64.

    In a dry run the CUDA versions run in the emulation; Triton must have been started with TRITON_INTERPRET=1, and is
    left out for bfloat16, which the interpreter computes wrongly.
    """
    figures, wrong = [], []
    for name, run in kernels().items():
        worst, where = worst_of(name, run, device, variants(DRY_SIZES if dry else SIZES, name, dry=dry))
        if worst <= 1:
            figures.append(Figure(f"{name}/error", worst, "", note="1 is allowed"))
        else:
            wrong.append(f"{name} is off by {worst:.2g} times what is allowed at {where}")
    for peer in PEERS:
        if why := peer.why_not():
            figures.append(Figure(f"{peer.name}/not checked", 0, "", note=why))
            continue
        off = peer_error(peer, device, dry=dry)
        if off <= PEER_TOLERANCE:
            figures.append(Figure(f"{peer.name}/difference", off, "", note=f"{PEER_TOLERANCE} is allowed"))
        else:
            wrong.append(f"{peer.name} differs by {off:.2g}: it does not compute the same, {PEER_TOLERANCE} is allowed")
    if wrong:
        raise CheckFailed("; ".join(wrong))
    return tuple(figures)


def kernels() -> dict[str, Run]:
    """What is checked, by name: runs on inputs and returns the tensors that `counts.exact` returns."""
    found: dict[str, Run] = {version.name: _cuda(version.name) for version in ladder.read(rope.SOURCE)}
    if importlib.util.find_spec("triton") is not None:
        found |= {"triton": _triton_turn, "triton, write": _triton_write}
    return found


def variants(sizes: Sequence[Case], name: str, *, dry: bool) -> list[Case]:
    """Each size in every type and both pairings."""
    skipped = (torch.bfloat16,) if dry and name.startswith("triton") else ()
    return [
        replace(size, dtype=dtype, interleaved=interleaved)
        for size in sizes
        for dtype in DTYPES
        if dtype not in skipped
        for interleaved in (False, True)
    ]


def worst_of(name: str, run: Run, device: str, cases: Sequence[Case]) -> tuple[float, str]:
    """(largest error, its case)."""
    oracle = {"triton": "rope_tokens", "triton, write": "rope_fast"}.get(name, name)
    worst, where = 0.0, ""
    for case in cases:
        inputs = Inputs.of(case, device)
        expected = counts.exact(oracle, inputs)
        error = counts.error(tuple(zip(run(inputs), expected, strict=True)))
        if error > worst:
            worst, where = error, str(case)
    return worst, where


def peer_error(peer: Peer, device: str, *, dry: bool) -> float:
    """Largest difference of a peer's q and k, or of the cache that it writes, from float64, in bfloat16."""
    inputs = Inputs.of(Case(*((5, 2, 1, 16, 16) if dry else (300, 32, 8, 128, 128))), device)
    expected = counts.exact("rope_fast" if peer.writes else "rope_tokens", inputs)
    result = peer.prepare(inputs)()
    if peer.writes:
        got: tuple[Tensor, ...] = (inputs.qkv[0], inputs.keys, inputs.values)
    elif isinstance(result, tuple):  # q and k, or with a batch in front and heads before tokens
        got = tuple(x[0].transpose(0, 1) if x.dim() == 4 else x for x in result[:2])
    else:
        got = inputs.qkv[:2]
    off = max(float((g.double() - e).abs().max()) for g, e in zip(got, expected, strict=True))
    largest = max(float(e.abs().max()) for e in expected)
    return float("inf") if math.isnan(off) else off / largest


def _cuda(version: str) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        call, written = counts.prepared(version, inputs)
        rope.prepare(version, call)()
        return written

    return run


def _triton_turn(inputs: Inputs) -> tuple[Tensor, ...]:
    from phase2_rope.kernels import rope_triton

    q, k, _ = inputs.qkv
    given = (inputs.cos_sin, inputs.positions)
    if inputs.case.in_place:
        rope_triton.rotate(q, k, *given, interleaved=inputs.case.interleaved)
        return q, k
    out_q, out_k = (torch.full_like(x.contiguous(), float("nan")) for x in (q, k))
    rope_triton.rotate_into(out_q, out_k, q, k, *given, interleaved=inputs.case.interleaved)
    return out_q, out_k


def _triton_write(inputs: Inputs) -> tuple[Tensor, ...]:
    from phase2_rope.kernels import rope_triton

    q, k, v = inputs.qkv
    where = (inputs.slots, inputs.keys, inputs.values)
    rope_triton.rotate_and_write(q, k, v, inputs.cos_sin, inputs.positions, *where, interleaved=inputs.case.interleaved)
    return q, inputs.keys, inputs.values
