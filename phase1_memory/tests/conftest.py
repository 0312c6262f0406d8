"""What the tests of the paged engine share. `IMPL=mine|framework|solution pytest phase1_memory` says whose run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.kv_spec import KVSpec
from phase0_prototype.llm import LLM as PrototypeLLM
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import Checkpoint
from phase0_prototype.tests.conftest import checkpoint, one_thread  # noqa: F401  the same fixtures here
from phase1_memory.kv_cache import PagedKVCache
from phase1_memory.llm import LLM
from phase1_memory.runs import Write

ORACLE = Use.parse("phase0=solution")


def is_empty(store: Any, seconds: float = 10.0) -> bool:
    """Whether an offload store holds no block, or will as soon as its thread has put down what it is at."""
    end = time.monotonic() + seconds
    while store is not None and store.used_blocks and time.monotonic() < end:
        time.sleep(0.01)
    return store is None or not store.used_blocks


@pytest.fixture(scope="session")
def use() -> Use:
    """Whose parts are tested. Earlier phases are the solution's, unless `IMPL` names them: they are not the subject."""
    chosen = Use.from_env("phase1", default="solution")
    return chosen if "phase0_prototype" in dict(chosen.choices) else chosen.choose("phase0", "solution")


@pytest.fixture(scope="session")
def part(use: Use) -> Callable[[str], ModuleType]:
    """The module of a part, of the implementation under test."""
    return lambda name: parts.resolve("phase1_memory", name, use)


@pytest.fixture(scope="session")
def make_tables(part: Callable[[str], ModuleType]) -> Callable[[int, int], Any]:
    """Block tables over (number of blocks, tokens in a block)."""

    def make(num_blocks: int, page: int) -> Any:
        allocator = part("allocator").make_allocator(num_blocks, kind="python")
        return part("block_tables").BlockTables(allocator, page)

    return make


@pytest.fixture(scope="session")
def make_cache(make_tables: Callable[[int, int], Any]) -> Callable[..., PagedKVCache]:
    """A cache on the CPU with the block tables under test; by default of two layers with keys of two numbers."""

    def make(num_blocks: int, page: int, spec: KVSpec | None = None) -> PagedKVCache:
        spec = spec or KVSpec(num_layers=2, num_kv_heads=1, head_dim=2, dtype=torch.float32)
        return PagedKVCache(spec, make_tables(num_blocks, page), torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def sharing(make_tables: Callable[[int, int], Any]) -> None:
    """For tests of what a fork costs. The framework's begin with nothing, which is right, and slow."""
    tables = make_tables(2, 4)
    tables.reserve([Write("parent", 0, 4)])
    if not tables.fork("parent", "child", 4):
        pytest.skip("forks share no blocks here: task 1.2")


@pytest.fixture(scope="session")
def on_demand(part: Callable[[str], ModuleType], make_cache: Callable[..., PagedKVCache]) -> None:
    """For tests of what happens when blocks run out: two sequences of one block begin, though both may need two."""
    scheduler = part("scheduler").Scheduler(make_cache(3, 4), 100, watermark=0)
    for name in "ab":
        scheduler.add(Request(name, [1, 2, 3], SamplingParams(), 0, (), 4))
    if len(scheduler.next_step().scheduled) < 2:
        pytest.skip("sequences are admitted by their worst case here, so that blocks never run out: task 1.3")


@pytest.fixture(scope="session")
def prompts_once(part: Callable[[str], ModuleType], make_cache: Callable[..., PagedKVCache], sharing: None) -> None:
    """For tests of prompts that are computed once for several answers."""
    scheduler = part("scheduler").Scheduler(make_cache(8, 4), 100)
    for name in "ab":
        scheduler.add(Request(name, [1, 2, 3], SamplingParams(n=2), 0, (), 4, group="group"))
    if len(scheduler.next_step().scheduled) > 1:
        pytest.skip("every sequence of a group computes the prompt here: task 1.3")


@pytest.fixture
def load(use: Use) -> Iterator[Callable[..., LLM]]:
    """A paged engine in float32 on the CPU with the parts under test; afterwards all its blocks must be free."""
    loaded: list[LLM] = []

    def get(source: Any, **settings: Any) -> LLM:
        path = source.path if isinstance(source, Checkpoint) else source
        fixed = {"dtype": "float32", "device": "cpu", "runner": "eager", "allocator": "python", "use": use}
        loaded.append(LLM(path, **{**fixed, **settings}))
        return loaded[-1]

    yield get
    for llm in loaded:
        engine = llm.engine
        assert not engine.has_unfinished()
        assert engine.kv.num_free == engine.kv.tables.num_blocks, "blocks leaked"
        assert not engine.kv.tables.tables
        assert not engine._answers and not engine._of_request
        assert is_empty(getattr(engine.scheduler, "store", None)), "blocks leaked in the offload store"


@pytest.fixture(scope="session")
def prototype() -> Callable[..., PrototypeLLM]:
    """Phase 0's engine, the solution's, in float32: what it says is right (its tests compare it to transformers)."""
    loaded: dict[Any, PrototypeLLM] = {}

    def get(source: Any) -> PrototypeLLM:
        path = source.path if isinstance(source, Checkpoint) else source
        if path not in loaded:
            loaded[path] = PrototypeLLM(path, dtype="float32", device="cpu", runner="eager", use=ORACLE)
        return loaded[path]

    return get
