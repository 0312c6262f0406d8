"""What must be right on a GPU before attention is timed there: benchmark cases `check_attention` and `check_kernels`.

Every kernel runs three times on the same lists of work, into results that are NaN beforehand, on caches that hold NaN
wherever there is no token. Figures are errors over what the type allows; above 1 `CheckFailed` is raised with one line
that names the kernel and its worst case.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.results import Figure
from phase3_paged_attention.measures import attention_errors, mla_inputs
from phase3_paged_attention.measures.attention_inputs import Case, Inputs, decode, make
from phase3_paged_attention.measures.attention_steps import into, ours, rung
from phase3_paged_attention.measures.mla_inputs import LatentCase

TIMES = 3  # each launch: counters of work must be zero again
MANY = 64  # programs that short work is split for
DECODES, MIXED, NODES = ((1, 1, 1), (77, 1, 530)), ((1, 13, 45, 1), (300, 140, 45, 6)), ((40, 64), (230, 64))
CHOICES: dict[str, Sequence[Any]] = {
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "dim": (128, 64, 80, 256, 96),
    "heads": ((8, 2), (4, 4), (16, 1), (6, 2), (7, 1)),  # Hq, Hkv: GQA, MHA, MQA, and groups of 3 and 7
    "page": (16, 64, 32, 128),
    "kv_format": ("auto", "fp8_e4m3", "fp8_per_token_head", "fp8_e5m2"),
    "window": (None, 37),
    "soft_cap": (None, 30.0),
    "lengths": (MIXED, DECODES, NODES),
}
WAYS: dict[str, dict[str, Any]] = {
    "paged": {},
    "paged, lists of fixed length": {"fixed": True},
    "paged, split, merged by the last program": {"programs": MANY, "last_block": True},
    "paged, split, merged by a launch": {"programs": MANY, "last_block": False},
}
RUNG_CASES = (
    Case((1, 77, 530), (1, 1, 1), 8, 2, 64),
    Case((40, 300, 17), (1, 1, 1), 6, 2, 80, page=32, dtype=torch.float16),
    decode(8, 1000),
)
LATENT_CASES = (
    LatentCase((1, 77, 530), (1, 1, 1), 16),
    LatentCase((300, 77, 64), (1, 1, 1), 128, packed=True),
    LatentCase((230, 64, 9), (5, 4, 2), 16, packed=True, page=16),
    LatentCase((90, 40), (33, 9), 32, tree=True),
    LatentCase((300, 77), (1, 3), 64, dtype=torch.float16, page=16),
    mla_inputs.decode(4, 5000, 128),
)
LARGE = (
    decode(8, 3000),
    Case((2048, 1500), (2048, 300)),
    decode(8, 3000, kv_format="fp8_e4m3"),
    Case((2000,) * 4, (64,) * 4, tree=True),
)
DRY_CASES = (
    Case((1, 21), (1, 1), 4, 2, 16, 3, torch.float16, window=9),
    Case((9, 20, 5), (1, 7, 5), 3, 1, 16, 16, torch.float32, soft_cap=5.0),
    Case((20, 9), (1, 4), 4, 2, 16, 16, torch.float16, "fp8_per_token_head"),
    Case((20,), (5,), 2, 2, 16, 16, torch.float16, "fp8_e5m2", tree=True),
)
DRY_RUNG_CASES = (Case((1, 21), (1, 1), 4, 2, 16, 16, torch.float16),)
DRY_LATENT_CASES = (
    LatentCase((40, 9), (1, 1), 4, 32, 8, 16, torch.float32),
    LatentCase((20, 9), (3, 1), 2, 128, 8, 16, torch.float16, packed=True),
)
Run = Callable[[Inputs], Callable[[], Tensor]]


def attention(device: str, *, dry: bool = False) -> tuple[Figure, ...]:
    """The paged family, in every way that it merges splits, against float64.

    In a dry run sizes are tiny, and Triton must have been started with TRITON_INTERPRET=1; it is silently wrong there
    for bfloat16, which is left out.

    Raises:
        CheckFailed: names each kernel that is wrong, by how much, and where.
    """
    family = DRY_CASES if dry else (*LARGE, *pairwise())
    few = DRY_CASES[:2] if dry else (*LARGE[:2], *family[len(LARGE) :: 10])
    errors = {name: worst(_family(options), few if options else family, device) for name, options in WAYS.items()}
    if device.startswith("cuda"):
        errors["paged, replayed from a graph"] = worst(_replayed, LARGE, device)
    return judged(errors)


def kernels(device: str, *, dry: bool = False) -> tuple[Figure, ...]:
    """The rungs of the decode ladder, attention to latents, and the write that quantises; see `attention`."""
    from phase3_paged_attention.kernels import decode_ladder
    from phase3_paged_attention.measures import write_checks

    rungs = DRY_RUNG_CASES if dry else RUNG_CASES
    times = 1 if dry else TIMES
    errors = {f"rung {name}": worst(_rung(name), rungs, device, times) for name in decode_ladder.RUNGS}
    errors["latents"] = worst_latents(DRY_LATENT_CASES if dry else LATENT_CASES, device, times)
    return judged(errors | write_checks.errors(device, dry=dry))


def judged(errors: Mapping[str, tuple[float, str]]) -> tuple[Figure, ...]:
    """Figures of (error, its case) by kernel. Raises CheckFailed with those that are above 1."""
    wrong = [
        f"{name} is off by {off:.2g} times what is allowed at {at}"
        for name, (off, at) in errors.items()
        if not off <= 1
    ]
    if wrong:
        raise CheckFailed("; ".join(wrong))
    return tuple(Figure(f"{name}/error", off, "", note=f"1 is allowed, at {at}") for name, (off, at) in errors.items())


def pairwise() -> list[Case]:
    """Cases in which every two choices of `CHOICES` meet at least once; deterministic."""
    random_ = random.Random(0)
    names = list(CHOICES)
    open_ = {
        (a, x, b, y) for a, b in combinations(range(len(names)), 2)
        for x, y in product(range(len(CHOICES[names[a]])), range(len(CHOICES[names[b]])))
    }  # fmt: skip
    rows = []
    while open_:
        a, x, b, y = min(open_)
        tried = []
        for _ in range(40):
            row = [random_.randrange(len(CHOICES[name])) for name in names]
            row[a], row[b] = x, y
            met = {(i, row[i], j, row[j]) for i, j in combinations(range(len(names)), 2)}
            tried.append((len(met & open_), row, met))
        _, row, met = max(tried, key=lambda one: one[0])
        open_ -= met
        rows.append(_case({name: CHOICES[name][at] for name, at in zip(names, row, strict=True)}))
    return rows


def worst(run: Run, cases: Sequence[Case], device: str, times: int = TIMES) -> tuple[float, str]:
    """(largest error, its case)."""
    found = (0.0, str(cases[0]))
    for case in cases:
        inputs = make(case, device, poisoned=True)
        expected = attention_errors.exact(inputs)
        allowed = attention_errors.allowed(inputs, expected)
        launch = run(inputs)
        for _ in range(times):
            off = attention_errors.error(launch().flatten(1), expected, allowed)
            if off > found[0]:
                found = off, str(case)
    return found


def worst_latents(cases: Sequence[LatentCase], device: str, times: int = TIMES) -> tuple[float, str]:
    """The same for the kernel for latents."""
    found = (0.0, str(cases[0]))
    for case in cases:
        inputs = mla_inputs.make(case, device, poisoned=True)
        expected, allowed, _ = mla_inputs.exact(inputs, range(len(case.new)))
        launch = mla_inputs.ours(inputs).bind(inputs.q, inputs.kv)
        for _ in range(times):
            off = attention_errors.error(launch(), expected, allowed)
            if off > found[0]:
                found = off, str(case)
    return found


def _rung(name: str) -> Run:
    return lambda inputs: rung(name, inputs).bind(inputs.q, inputs.kv)


def _family(options: dict[str, Any]) -> Run:
    """The family into a result of NaN; a counter that is left is an infinite error."""

    def run(inputs: Inputs) -> Callable[[], Tensor]:
        out = torch.empty(inputs.q.shape, dtype=inputs.q.dtype, device=inputs.q.device)
        launch = into(out, inputs, **options)

        def once() -> Tensor:
            out.fill_(float("nan"))
            left = any(bool(work.counters.any()) for work in launch())
            return out.fill_(float("nan")) if left else out

        return once

    return run


def _replayed(inputs: Inputs) -> Callable[[], Tensor]:
    """From a CUDA graph; NaN unless it gives the same numbers as the launch that it holds."""
    launch = ours(inputs, fixed=True).bind(inputs.q, inputs.kv)
    eager, graph = launch().clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = launch()

    def replay() -> Tensor:
        out.fill_(float("nan"))
        graph.replay()
        return out if torch.equal(out, eager) else torch.full_like(out, float("nan"))

    return replay


def _case(chosen: dict[str, Any]) -> Case:
    (new, lengths), (heads, kv_heads) = chosen.pop("lengths"), chosen.pop("heads")
    tree = (new, lengths) == NODES
    return Case(lengths, new, heads, kv_heads, tree=tree, **chosen)
