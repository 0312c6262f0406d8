"""Engines without a model for tests, and the patience of tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from phase0_prototype.hub import SHIPPED
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tokenizer import Tokenizer
from phase4_scheduler.async_llm import AsyncLLM, Supervision

T = TypeVar("T")
PATIENCE = 60.0  # seconds; machines may be loaded
PROMPT = "def greet(name):"


def run(work: Coroutine[Any, Any, T]) -> T:
    """In an event loop of its own, and not for ever."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, 2 * PATIENCE)

    return asyncio.run(bounded())


@asynccontextmanager
async def null_llm(*, supervision: Supervision = Supervision(), **settings: Any) -> AsyncIterator[AsyncLLM]:  # noqa: B008
    """A ready engine without a model; steps take 5 ms."""
    llm = AsyncLLM("null", {"step_seconds": 0.005, **settings}, supervision=supervision)
    await llm.start()
    try:
        await llm.ready(PATIENCE)
        yield llm
    finally:
        await llm.shutdown()


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.01)


def tokens(count: int, **more: Any) -> SamplingParams:
    """An answer of so many tokens."""
    return SamplingParams(max_tokens=count, **more)


def tiny_tokenizer() -> Tokenizer:
    """Of the shipped model."""
    return Tokenizer(Path(SHIPPED["titan-tiny"]) / "tokenizer.json")
