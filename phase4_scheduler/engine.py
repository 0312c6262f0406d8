"""The engine as of phase 4: phase 3's, with a scheduler that makes every step anew and a loop that runs ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.engine import ROOM as PROTOTYPE
from phase0_prototype.engine import Engine
from phase0_prototype.engine_config import resolve_device
from phase0_prototype.errors import UserError
from phase1_memory.kv_cache import PagedKVCache
from phase3_paged_attention import engine as attending
from phase4_scheduler.engine_config import ServingConfig
from phase4_scheduler.memory import StoreSwap

ROOM = __name__.rpartition(".")[0]


def build(
    config: ServingConfig, use: Use | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Engine:
    """Load a checkpoint and assemble an engine around it; arguments and errors as in phase 1."""
    use = use or Use()
    scheduler, loops = resolve(ROOM, "scheduler", use), resolve(ROOM, "loop", use)

    def schedule(kv: PagedKVCache, store: Any) -> Any:
        return scheduler.Scheduler(kv, config.scheduling, None if store is None else StoreSwap(kv, store))

    loop = loops.AheadLoop if runs_ahead(config, use) else loops.Loop
    return attending.build(config, use, advance, schedule=schedule, loop=loop)


def runs_ahead(config: ServingConfig, use: Use) -> bool:
    """Whether steps are launched one ahead.

    Raises:
        UserError: that is asked for of a model that can't.
    """
    on = config.async_scheduling == "on"
    if on and use.of(PROTOTYPE) != "solution":
        raise UserError(f"async_scheduling=on needs phase0=solution, not {use.of(PROTOTYPE)}: its runner may wait")
    return on or (config.async_scheduling == "auto" and resolve_device(config.device).type == "cuda")
