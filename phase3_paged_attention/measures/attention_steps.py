"""The paged kernels as they are checked and timed: a step is planned once and launched as often as wanted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from module0_profiling.course.parts import Use, resolve
from module0_profiling.timing import rotated
from phase3_paged_attention.attention import TritonAttention
from phase3_paged_attention.measures.attention_inputs import KV, Inputs
from phase3_paged_attention.work_list import Work

ROOM = __name__.partition(".")[0]
SOLUTION = Use(((ROOM, "solution"),))
Launch = Callable[[], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A step that is ready to run.

    Attributes:
        plan: does the host's work of a step again, for its time.
        bind: (q, kv) -> what computes [T, Hq * D] or [T, Hq, D]; copies that a peer wants in its layout are made here.
    """

    plan: Callable[[], object]
    bind: Callable[[Tensor, KV], Launch]


def ours(inputs: Inputs, *, fixed: bool = False, use: Use | None = None, **changes: Any) -> Prepared:
    """The kernel family as the engine runs it.

    Args:
        inputs: the step; others with the same tables may be bound.
        fixed: with lists of fixed length, as captured steps have them.
        use: whose kernel and planner; None: the solution's.
        changes: see `changed`.
    """
    spec, device = inputs.case.spec, inputs.q.device
    paged, work = (resolve(ROOM, part, use or SOLUTION) for part in ("kernels.paged", "work"))
    backend = TritonAttention(spec, device, changed(paged, **changes) if changes else paged, work, fixed)
    batch, windows = inputs.batch, frozenset({spec.window})

    def plan() -> Any:
        return backend.plan(batch, windows, inputs.case.page, inputs.visible)

    planned = plan()
    return Prepared(plan, lambda q, kv: lambda: backend.run(spec, q, q, q, kv, planned))


def into(out: Tensor, inputs: Inputs, *, fixed: bool = False, **changes: Any) -> Callable[[], tuple[Work, ...]]:
    """The same, written to `out` [T, Hq, D]; each call returns the lists of work, whose counters must be zero again."""
    from phase3_paged_attention import work
    from phase3_paged_attention.kernels import paged

    spec, kernels = inputs.case.spec, changed(paged, **changes)
    backend = TritonAttention(spec, inputs.q.device, kernels, work, fixed)
    plan = backend.plan(inputs.batch, frozenset({spec.window}), inputs.case.page, inputs.visible)
    options = {"scale": spec.scale, "window": spec.window, "soft_cap": spec.soft_cap, "out": out}

    def launch() -> tuple[Work, ...]:
        for one in plan.work[spec.window]:
            kernels.attend(inputs.q, inputs.kv, plan.tables, one, **options)
        return plan.work[spec.window]

    return launch


def changed(
    paged: ModuleType,
    *,
    tile: Any = None,
    tokens: int | None = None,
    programs: int | None = None,
    last_block: bool | None = None,
) -> Any:
    """The kernels with another tile, tokens of a tile, programs that work is split for, or way to merge splits."""
    names: dict[str, Any] = dict(vars(paged))
    names["attend"] = partial(paged.launch, tile=tile, last_block=last_block)
    if tile is not None:
        names["block_n_of"] = lambda spec, device, tokens: tile.block_n
        names["programs_of"] = lambda spec, device, tokens: multiprocessors(device) * tile.blocks
    if tokens is not None:
        names["tokens_of"] = lambda spec, device, length: min(tokens, length)
    if programs is not None:
        names["programs_of"] = lambda spec, device, tokens: programs
    return SimpleNamespace(**names)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter is given few, so that it splits work too."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


def rung(name: str, inputs: Inputs) -> Prepared:
    """A rung of the decode ladder; it has no plan."""
    from phase3_paged_attention.kernels import decode_ladder

    tables, lens, scale = inputs.block_tables, inputs.seq_lens, inputs.case.spec.scale

    def bind(q: Tensor, kv: KV) -> Launch:
        packed = q.contiguous()
        return lambda: decode_ladder.run(name, packed, kv[0], kv[1], lens, tables, scale)

    return Prepared(lambda: None, bind)


def in_turns(prepared: Prepared, copies: Sequence[Inputs]) -> Launch:
    """One launch a call, on the next of the inputs each time."""
    launches = [prepared.bind(one.q, one.kv) for one in copies]
    turn = rotated(lambda launch: launch(), launches)
    return turn  # type: ignore[return-value]  # rotated() does not say what its function returns


def plan_seconds(prepared: Prepared, device: str, tries: int = 5) -> float:
    """Median seconds of the host for a plan, its copy to the device included."""
    taken = []
    for _ in range(tries):
        began = time.perf_counter()
        prepared.plan()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
