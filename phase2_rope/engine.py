"""The engine as of phase 2: phase 1's, with this phase's layers and DeepSeek's attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.engine import ROOM as PROTOTYPE
from phase0_prototype.engine import Engine
from phase1_memory import engine as paged
from phase1_memory.engine_config import PagedConfig
from phase2_rope.deepseek import ARCHITECTURES
from phase2_rope.layers import RopeLayers

ROOM = __name__.rpartition(".")[0]


def build(
    config: PagedConfig, use: Use | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Engine:
    """Load a checkpoint and assemble an engine around it; arguments and errors as in phase 1."""
    use = use or Use()
    layers = partial(
        RopeLayers,
        rope=resolve(ROOM, "rope", use),
        mla=resolve(ROOM, "mla", use),
        gathered=use.of(PROTOTYPE) != "solution",
    )
    return paged.build(config, use, advance, layers=layers, architectures=ARCHITECTURES)
