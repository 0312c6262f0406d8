"""What tests of phase 3 share. `IMPL=mine|framework|solution pytest phase3_paged_attention` says whose parts run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.tests.checkpoints import Checkpoint
from phase0_prototype.tests.conftest import checkpoint, one_thread  # noqa: F401  the same fixtures here
from phase2_rope.tests.conftest import deepseek  # noqa: F401


@pytest.fixture(scope="session")
def use() -> Use:
    """Whose parts are tested. Earlier phases are the solution's, unless `IMPL` names them: they are not the subject."""
    chosen = Use.from_env("phase3", default="solution")
    for phase in ("phase0_prototype", "phase1_memory", "phase2_rope"):
        if phase not in dict(chosen.choices):
            chosen = chosen.choose(phase, "solution")
    return chosen


@pytest.fixture(scope="session")
def part(use: Use) -> Callable[[str], ModuleType]:
    """The module of a part, of the implementation under test."""
    return lambda name: parts.resolve("phase3_paged_attention", name, use)


@pytest.fixture(scope="session")
def load(use: Use) -> Callable[..., Any]:
    """An engine in float32 on the CPU with the parts under test; arguments as for `LLM`."""
    from phase3_paged_attention.llm import LLM

    def get(source: Any, **settings: Any) -> Any:
        path = source.path if isinstance(source, Checkpoint) else source
        return LLM(path, **{"dtype": "float32", "device": "cpu", "runner": "eager", "use": use, **settings})

    return get
