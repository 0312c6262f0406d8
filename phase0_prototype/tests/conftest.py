"""What the tests of the engine share. `IMPL=mine|framework|solution pytest phase0_prototype` says whose parts run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.llm import LLM
from phase0_prototype.tests import checkpoints
from phase0_prototype.tests.checkpoints import Checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def use() -> Use:
    """Whose parts are tested."""
    return Use.from_env("phase0", default="solution")


@pytest.fixture(scope="session")
def part(use: Use) -> Callable[[str], ModuleType]:
    """The module of a part, of the implementation under test."""
    return lambda name: parts.resolve("phase0_prototype", name, use)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A tiny random checkpoint by the name of its variant, written at its first use."""
    written: dict[str, Checkpoint] = {}

    def get(variant: str) -> Checkpoint:
        if variant not in written:
            written[variant] = checkpoints.write(variant, tmp_path_factory.mktemp(variant))
        return written[variant]

    return get


@pytest.fixture(scope="session")
def load(use: Use) -> Callable[..., LLM]:
    """An engine in float32 on the CPU with the parts under test; arguments as for `LLM`."""

    def get(source: Any, **settings: Any) -> LLM:
        path = source.path if isinstance(source, Checkpoint) else source
        return LLM(path, **{"dtype": "float32", "device": "cpu", "runner": "eager", "use": use, **settings})

    return get
