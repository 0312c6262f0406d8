"""A snapshot of who holds which block, taken from an engine while it runs."""

from __future__ import annotations

from typing import Any

from phase0_prototype.sampling_params import SamplingParams
from phase1_memory.llm import LLM
from phase1_memory.memory_map import MemorySnapshot

BLOCKS, PAGE = 128, 16  # few enough to be seen one by one


def snapshot(engine: Any) -> MemorySnapshot:
    """What the engine's cache looks like now."""
    tables = engine.kv.tables
    computed = {request.request_id: request.num_computed_tokens for request in engine.scheduler.running}
    return MemorySnapshot(
        num_blocks=tables.num_blocks,
        page=tables.page,
        tables={name: tuple(table) for name, table in tables.tables.items()},
        lengths={name: computed.get(name, 0) for name in tables.tables},
        free=tuple(block for block, count in enumerate(tables.references) if not count),
    )


def snapshot_of(prompts: list[str], model: str, n: int, tokens: int) -> MemorySnapshot:
    """Run the prompts on an engine with few blocks, n continuations each, and look when they have `tokens` tokens.

    Raises:
        UserError: model, prompts or numbers are wrong.
    """
    llm = LLM(model, num_blocks=BLOCKS, block_size=PAGE, watermark=0.0)
    engine = llm.engine
    params = SamplingParams(temperature=1.0, n=n, seed=0, max_tokens=tokens, ignore_eos=True)
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    found = snapshot(engine)
    while engine.has_unfinished() and not any(output.finished for output in engine.step()):
        found = snapshot(engine)  # the last before the first of them ends
    for request_id in ids:
        engine.abort(request_id)
    return found
