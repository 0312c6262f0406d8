"""The engine as of phase 1: phase 0's loop, with a paged cache, admission by blocks and an offload store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.config import ARCHITECTURES, Architecture
from phase0_prototype.engine import ROOM as PROTOTYPE
from phase0_prototype.engine import Engine
from phase0_prototype.errors import UserError
from phase0_prototype.layers import Layers
from phase0_prototype.loading import describe
from phase0_prototype.loop import Loop
from phase0_prototype.tokenizer import load_tokenizer
from phase1_memory.engine_config import PagedConfig
from phase1_memory.kv_cache import PagedKVCache
from phase1_memory.memory_plan import memory_of, plan_memory
from phase1_memory.probe import reads_cache

ROOM = __name__.rpartition(".")[0]
PARTS = ("allocator", "block_tables", "attention", "scheduler", "offload")


def build(
    config: PagedConfig,
    use: Use | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    layers: Callable[..., Layers] = Layers,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
    schedule: Callable[[PagedKVCache, Any], Any] | None = None,
    loop: Callable[..., Any] = Loop,
) -> Engine:
    """Load a checkpoint and assemble an engine around it.

    Args:
        config: the settings.
        use: which implementation of the course's parts; by default the learner's where there is one.
        advance: called with (bytes loaded, bytes in all) while weights load.
        layers, architectures: what a later phase builds the model of, and which models it knows.
        schedule: makes a later phase's scheduler of the cache and the offload store (None without one).
        loop: turns it.

    Raises:
        UserError: anything about model, device or sizes that the user can put right.
    """
    use = use or Use()
    part = {name: resolve(ROOM, name, use) for name in PARTS}
    decoder, backend = resolve(PROTOTYPE, "model", use).DecoderModel, part["attention"].PagedTorchAttention()
    described = describe(config, decoder, backend, layers, architectures)
    model, device = described.model, described.device
    plan = plan_memory(config, described.config, model.kv_spec, device, memory_of(device, model.weight_bytes))
    described.load(advance)
    allocator = part["allocator"].make_allocator(plan.num_blocks, kind=config.allocator)
    tables = part["block_tables"].BlockTables(allocator, config.block_size)
    kv = PagedKVCache(model.kv_spec, tables, device)
    if use.of(PROTOTYPE) != "solution" and not reads_cache(model, kv):
        raise UserError(
            f"phase0={use.of(PROTOTYPE)}: its model does not read the KV cache, which this engine relies on: do task "
            "0.1, or run it in its own engine: --phase phase0"
        )
    store: Any = None
    if config.preemption == "swap":
        store = part["offload"].open_store(
            plan.block_bytes, device, config.swap_bytes, config.offload_dir, config.offload_bytes
        )
    if schedule is not None:
        scheduler = schedule(kv, store)
    else:
        scheduler = part["scheduler"].Scheduler(
            kv,
            config.max_num_batched_tokens,
            config.max_seqs,
            watermark=config.watermark,
            pressure=config.preemption,
            store=store,
        )
    return Engine(
        model,
        kv,
        scheduler,
        resolve(PROTOTYPE, "runner", use).RUNNERS[described.runner](model, kv),
        config=described.config,
        tokenizer=load_tokenizer(described.directory),
        max_model_len=plan.max_model_len,
        device=device,
        seed=config.seed,
        loop=loop,
    )
