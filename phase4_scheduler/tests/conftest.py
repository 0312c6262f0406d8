"""What tests of phase 4 share. `IMPL=mine|framework|solution pytest phase4_scheduler` says whose parts run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from module0_profiling.course.parts import Use, resolve
from phase4_scheduler.tests.scheduling import World


@pytest.fixture(scope="session")
def use() -> Use:
    """Whose parts are tested. Earlier phases are the solution's, unless `IMPL` names them: they are not the subject."""
    chosen = Use.from_env("phase4", default="solution")
    for phase in ("phase0_prototype", "phase1_memory", "phase2_rope", "phase3_paged_attention"):
        if phase not in dict(chosen.choices):
            chosen = chosen.choose(phase, "solution")
    return chosen


@pytest.fixture(scope="session")
def parts(use: Use) -> tuple[ModuleType, ModuleType]:
    """The modules of scheduler and loop, of the implementation under test."""
    return resolve("phase4_scheduler", "scheduler", use), resolve("phase4_scheduler", "loop", use)


@pytest.fixture
def world(parts: tuple[ModuleType, ModuleType]) -> Callable[..., World]:
    """A scheduler with a model of a model; arguments as for `World`."""
    return lambda **settings: World(*parts, **settings)


@pytest.fixture(scope="session")
def continuous(parts: tuple[ModuleType, ModuleType]) -> None:
    """For tests of what happens within a batch: somebody comes in while somebody else runs."""
    world = World(*parts)
    world.one(2, 9)
    world.step()
    world.one(2, 9)
    if len(world.step().requests) < 2:
        pytest.skip("batches are static here: task 4.1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tiny random checkpoint by its variant, with the same model in transformers; "deepseek-..." has latents."""
    from phase0_prototype.tests import checkpoints
    from phase2_rope.tests import deepseek_checkpoints

    written: dict[str, Any] = {}

    def get(variant: str) -> Any:
        if variant not in written:
            path = tmp_path_factory.mktemp(variant)
            family = variant.removeprefix("deepseek-")
            write = checkpoints.write if family == variant else deepseek_checkpoints.write
            written[variant] = write(family, path)
        return written[variant]

    return get


@pytest.fixture(scope="session")
def load(use: Use) -> Callable[..., Any]:
    """An engine in float32 on the CPU with the parts under test; arguments as for `LLM`."""
    from phase4_scheduler.llm import LLM

    def get(source: Any, **settings: Any) -> Any:
        fixed = {"dtype": "float32", "device": "cpu", "runner": "eager", "allocator": "python", "use": use}
        return LLM(getattr(source, "path", source), **{**fixed, **settings})

    return get
