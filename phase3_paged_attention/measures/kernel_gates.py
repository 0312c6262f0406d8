"""What the gates ask a kernel in Triton's interpreter: is it right, and which bytes do its own addresses name?

Each function takes a `Use`, so that the kernel may be the learner's. It runs in a process of its own (`interpreted`),
in float32 and float16: the interpreter is silently wrong for bfloat16. Sizes are small, for it is slow; what is counted
does not depend on them.

The planner of 3.1 is the solution's, whoever wrote the kernel: so a kernel meets split sequences before task 3.2 does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from module0_profiling.course.parts import Use, resolve
from phase3_paged_attention.attention import KernelPlan, TritonAttention
from phase3_paged_attention.kernels import costs
from phase3_paged_attention.kernels.trace import Trace
from phase3_paged_attention.measures import attention_errors, mla_inputs
from phase3_paged_attention.measures.attention_inputs import Case, Inputs, extend, make
from phase3_paged_attention.measures.attention_steps import SOLUTION
from phase3_paged_attention.measures.interpreted import ROOM, answer
from phase3_paged_attention.measures.mla_inputs import LatentCase

CPU = torch.device("cpu")
HALF: dict[str, Any] = {"dtype": torch.float16}
SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "dim": 32}
STEPS = {  # (programs that work is split for, step)
    "decode, split": (16, Case((130, 1, 17), (1, 1, 1), 4, 2, 16, dtype=torch.float32)),
    "two tiles and a chunk": (1, Case((25, 17), (2, 17), 8, 1, 16, page=32, **HALF)),
    "in a window, capped": (4, Case((60, 9), (1, 4), 3, 3, 48, dtype=torch.float32, window=21, soft_cap=2.0)),
    "tree": (1, Case((30, 12), (6, 1), 2, 1, 16, dtype=torch.float32, tree=True)),
    "e4m3, scale a token, split": (8, Case((140, 5), (1, 1), **SMALL, **HALF, kv_format="fp8_per_token_head")),
    "e5m2": (1, Case((13,), (2,), **SMALL, page=4, dtype=torch.float32, kv_format="fp8_e5m2")),
}
DECODE = extend(2, 60, 1, (4, 1, 64), **HALF)
PROMPT = extend(1, 32, 32, (4, 1, 16), page=32, **HALF)
PROMPT_ROWS = 128  # of the tiles that the minimum is for
LONG = extend(1, 512, 1, (4, 1, 16), page=64, **HALF)
LONG_PROGRAMS = 4
LATENT_STEPS = {
    "decode": LatentCase((40, 1, 200), (1, 1, 1), 5, 32, 16, 16, torch.float32),
    "few new tokens": LatentCase((40, 5, 130), (3, 5, 1), 4, 64, 16, 16, torch.float16),
    "tree": LatentCase((30,), (6,), 4, 32, 8, 16, torch.float32, tree=True),
    "FP8": LatentCase((50, 9), (1, 2), 4, 128, 16, 16, torch.float16, packed=True),
}
LATENT_DECODE = LatentCase((60, 17), (1, 1), 16, 512, 64, 16, torch.float16)


def paged(use: Use) -> dict[str, Any]:
    """Of `kernels.paged`: largest error over what is allowed and its step, and bytes as multiples.

    `decode`, `prompt`: bytes of K and V over those needed; `unfused`: all bytes over those of PyTorch's operations;
    `busiest`: bytes of K and V for one item over an even share, with the planner of `use`.
    """
    kernels, planner = (resolve(ROOM, part, use) for part in ("kernels.paged", "work"))
    return {**_worst(_paged_errors(kernels)), **_decode_bytes(kernels), **_prompt_bytes(kernels),
            "busiest": _busiest(kernels, planner)}  # fmt: skip


def latents(use: Use) -> dict[str, Any]:
    """Of `kernels.mla`: as `paged`; `decode` is bytes of the cache over those of its entries once."""
    solution = resolve(ROOM, "work", SOLUTION)
    kernels = resolve(ROOM, "kernels.mla", use)
    inputs = mla_inputs.make(LATENT_DECODE, "cpu")
    run = _latent_launch(kernels, solution, inputs)
    with Trace({"cache": inputs.cache}) as trace:
        run()
    case = LATENT_DECODE
    read, needed = trace.loads("cache").requested, sum(case.lengths) * case.entry_bytes
    return {**_worst(_latent_errors(kernels, solution)), "decode": read / needed, "a token": read / sum(case.lengths)}


def _worst(errors: Iterator[tuple[str, float]]) -> dict[str, Any]:
    step, error = max(errors, key=lambda found: found[1])
    return {"error": error, "step": step}


def _paged_errors(kernels: ModuleType) -> Iterator[tuple[str, float]]:
    for i, (name, (programs, case)) in enumerate(STEPS.items()):
        inputs = make(case, "cpu", poisoned=True, seed=i)
        got = torch.full_like(inputs.q, float("nan"), memory_format=torch.contiguous_format)
        _launch(kernels, resolve(ROOM, "work", SOLUTION), inputs, programs)(got)
        exact = attention_errors.exact(inputs)
        yield name, attention_errors.error(got.flatten(1), exact, attention_errors.allowed(inputs, exact))


def _decode_bytes(kernels: ModuleType) -> dict[str, float]:
    inputs, case = make(DECODE, "cpu"), DECODE
    moved = _traced(inputs, _launch(kernels, resolve(ROOM, "work", SOLUTION), inputs, 1))
    step = costs.Decode(case.lengths, case.heads, case.kv_heads, case.dim)
    return {
        "decode": moved.loads("keys", "values").requested / (2 * step.cached),
        "unfused": moved.bytes() / costs.total(costs.unfused(step)),
        "unfused by the model": sum(costs.requested("packed", step).values()) / costs.total(costs.unfused(step)),
    }


def _prompt_bytes(kernels: ModuleType) -> dict[str, float]:
    inputs, case = make(PROMPT, "cpu"), PROMPT
    moved = _traced(inputs, _launch(kernels, resolve(ROOM, "work", SOLUTION), inputs, 1))
    tokens = PROMPT_ROWS * case.kv_heads // case.heads
    ends = sum(min(first + tokens, case.new[0]) for first in range(0, case.new[0], tokens))
    needed = 2 * ends * case.kv_heads * case.dim * case.dtype.itemsize
    return {"prompt": moved.loads("keys", "values").requested / needed}


def _busiest(kernels: ModuleType, planner: ModuleType) -> float:
    inputs, most = make(LONG, "cpu"), 0
    plan = _plan(kernels, planner, inputs, LONG_PROGRAMS)
    (work,) = plan.work[None]
    for row in work.items[work.items[:, 0] >= 0]:
        alone = replace(work, items=row[None], counters=work.counters.clone())
        one = replace(plan, work={None: (alone,)})
        most = max(most, _traced(inputs, _run(kernels, inputs, one)).loads("keys", "values").requested)
    share = LONG.lengths[0] * 2 * LONG.dim * LONG.dtype.itemsize / LONG_PROGRAMS
    return most / share


def _traced(inputs: Inputs, launch: Callable[[Tensor], None]) -> Trace:
    out = torch.empty_like(inputs.q, memory_format=torch.contiguous_format)
    with Trace({"keys": inputs.kv[0], "values": inputs.kv[1]}) as trace:
        launch(out)
    return trace


def _launch(kernels: ModuleType, planner: ModuleType, inputs: Inputs, programs: int) -> Callable[[Tensor], None]:
    """What writes a step's result to [T, Hq, D], planned."""
    return _run(kernels, inputs, _plan(kernels, planner, inputs, programs))


def _plan(kernels: ModuleType, planner: ModuleType, inputs: Inputs, programs: int) -> KernelPlan:
    told: Any = SimpleNamespace(**{**vars(kernels), "programs_of": lambda spec, device, tokens: programs})
    spec = inputs.case.spec
    backend = TritonAttention(spec, CPU, told, planner)
    return backend.plan(inputs.batch, frozenset({spec.window}), inputs.case.page, inputs.visible)


def _run(kernels: ModuleType, inputs: Inputs, plan: KernelPlan) -> Callable[[Tensor], None]:
    spec = inputs.case.spec

    def launch(out: Tensor) -> None:
        options = {"scale": spec.scale, "window": spec.window, "soft_cap": spec.soft_cap, "out": out}
        for work in plan.work[spec.window]:
            kernels.attend(inputs.q, inputs.kv, plan.tables, work, **options)

    return launch


def _latent_errors(kernels: ModuleType, planner: ModuleType) -> Iterator[tuple[str, float]]:
    for i, (name, case) in enumerate(LATENT_STEPS.items()):
        inputs = mla_inputs.make(case, "cpu", poisoned=True, seed=i)
        got = _latent_launch(kernels, planner, inputs)()
        exact, allowed, _ = mla_inputs.exact(inputs, range(len(case.new)))
        yield name, attention_errors.error(got.view(exact.shape), exact, allowed)


def _latent_launch(kernels: ModuleType, planner: ModuleType, inputs: mla_inputs.LatentInputs) -> Callable[[], Tensor]:
    case = inputs.case
    cut = kernels.cut_for(case.heads, max(case.new), case.dtype, case.packed, CPU)
    work = planner.plan_work(
        case.new, case.lengths, group=cut.group, kv_heads=cut.head_tiles, window=None, programs=cut.programs,
        block_n=cut.block_n, tokens=cut.tokens, device=CPU,
    )  # fmt: skip
    sizes = {"scale": case.scale, "latent": case.latent, "rope": case.rope}
    return lambda: kernels.attend_latents(inputs.q, inputs.cache, inputs, work, **sizes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN: what nobody writes is noticed
    answer({"paged": paged, "latents": latents}, sys.argv[1:])
