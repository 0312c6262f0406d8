"""The engine as of phase 4: phase 3's, with a scheduler that makes every step anew and a loop that runs ahead."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.attention import AttentionSpec
from phase0_prototype.engine import ROOM as PROTOTYPE
from phase0_prototype.engine import Engine
from phase0_prototype.engine_config import resolve_device, resolve_runner
from phase0_prototype.errors import UserError
from phase1_memory.kv_cache import PagedKVCache
from phase2_rope.engine import ROOM as ROPE
from phase3_paged_attention import engine as attending
from phase3_paged_attention.engine import ROOM as ATTENTION
from phase4_scheduler.cpu_attention import CpuAttention
from phase4_scheduler.cpu_layers import CpuLayers
from phase4_scheduler.engine_config import ServingConfig
from phase4_scheduler.kernels.library import why_not_cpu_kernels
from phase4_scheduler.memory import StoreSwap

ROOM = __name__.rpartition(".")[0]
KERNELS_REPLACE = (PROTOTYPE, ROPE, ATTENTION)  # phases whose parts the CPU kernels are faster forms of


def _cpu(spec: AttentionSpec, device: torch.device) -> CpuAttention:
    return CpuAttention()


MORE_BACKENDS = MappingProxyType({"cpu": _cpu})


def build(
    config: ServingConfig, use: Use | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Engine:
    """Load a checkpoint and assemble an engine around it; arguments and errors as in phase 1."""
    use = use or Use()
    scheduler, loops = resolve(ROOM, "scheduler", use), resolve(ROOM, "loop", use)

    def schedule(kv: PagedKVCache, store: Any) -> Any:
        return scheduler.Scheduler(kv, config.scheduling, None if store is None else StoreSwap(kv, store))

    loop = loops.AheadLoop if runs_ahead(config, use) else loops.Loop
    more: dict[str, Any] = {}
    if why_not_on_cpu(config, use) is None:
        more = {"layers": CpuLayers, "more_backends": MORE_BACKENDS}
    return attending.build(config, use, advance, schedule=schedule, loop=loop, **more)


def explain(model: str, kv_cache_dtype: str = "auto", device: str = "auto") -> list[tuple[str, str]]:
    """Who would attend to a model here, and why: see phase 3."""
    return attending.explain(model, kv_cache_dtype, device, MORE_BACKENDS)


def runs_ahead(config: ServingConfig, use: Use) -> bool:
    """Whether steps are launched one ahead.

    Raises:
        UserError: that is asked for of a model that can't.
    """
    on = config.async_scheduling == "on"
    if on and use.of(PROTOTYPE) != "solution":
        raise UserError(f"async_scheduling=on needs phase0=solution, not {use.of(PROTOTYPE)}: its runner may wait")
    return on or (config.async_scheduling == "auto" and resolve_device(config.device).type == "cuda")


def why_not_on_cpu(config: ServingConfig, use: Use) -> str | None:
    """Why the CPU kernels don't run the layers, in one line; None: they do.

    Raises:
        UserError: they were asked for.
    """
    device = resolve_device(config.device)
    others = [f"{phase}={use.of(phase)}" for phase in KERNELS_REPLACE if use.of(phase) != "solution"]
    why: str | None
    if config.cpu_kernels == "off":
        why = "cpu_kernels=off"
    elif device.type != "cpu":
        why = f"they are for CPUs, not {device.type}"
    elif resolve_runner(config.runner, device) != "eager":
        why = f"runner={config.runner} compiles torch's own operators"
    elif others:
        why = f"they would run in place of {', '.join(others)}"
    elif why := why_not_cpu_kernels():
        _warn_once(why)
    if why and config.attention_backend == "cpu":
        raise UserError(f"attention_backend=cpu needs the CPU kernels: {why}")
    if why and config.cpu_kernels == "on":
        raise UserError(f"cpu_kernels=on can't be: {why}")
    return why


@functools.cache
def _warn_once(why: str) -> None:
    logging.getLogger(__name__).warning("without the CPU kernels a step takes longer: %s", why)
