"""What the tests of phase 2 share. `IMPL=mine|framework|solution pytest phase2_rope` says whose parts run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.tests.checkpoints import SIZES, Checkpoint, save
from phase0_prototype.tests.conftest import checkpoint, one_thread  # noqa: F401  the same fixtures here

ORIGINAL = 32
SCALINGS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 6.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.0 + 0.6 * i for i in range(8)],
    },
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


@pytest.fixture(scope="session")
def use() -> Use:
    """Whose parts are tested. Earlier phases are the solution's, unless `IMPL` names them: they are not the subject."""
    chosen = Use.from_env("phase2", default="solution")
    for phase in ("phase0_prototype", "phase1_memory"):
        if phase not in dict(chosen.choices):
            chosen = chosen.choose(phase, "solution")
    return chosen


@pytest.fixture(scope="session")
def part(use: Use) -> Callable[[str], ModuleType]:
    """The module of a part, of the implementation under test."""
    return lambda name: parts.resolve("phase2_rope", name, use)


@pytest.fixture(scope="session")
def load(use: Use) -> Callable[..., Any]:
    """An engine in float32 on the CPU with the parts under test; arguments as for `LLM`."""
    from phase2_rope.llm import LLM

    def get(source: Any, **settings: Any) -> Any:
        path = source.path if isinstance(source, Checkpoint) else source
        return LLM(path, **{"dtype": "float32", "device": "cpu", "runner": "eager", "use": use, **settings})

    return get


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory):
    from phase2_rope.tests.deepseek_checkpoints import write

    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = write(variant, tmp_path_factory.mktemp(variant))
        return made[variant]

    return get


@pytest.fixture(scope="session")
def scaled(tmp_path_factory):
    """A tiny Llama with a rope type; where the type stretches it, the config's context is the original one."""
    made = {}

    def get(name):
        if name not in made:
            context = {"max_position_embeddings": ORIGINAL} if name == "dynamic" else {}
            sizes = {**SIZES, "rope_parameters": SCALINGS[name], **context}
            made[name] = save("Llama", sizes, tmp_path_factory.mktemp(name), seed=sum(map(ord, f"scaled-{name}")))
        return made[name]

    return get
