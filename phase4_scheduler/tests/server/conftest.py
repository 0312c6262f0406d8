"""Servers to test against: `titan serve` in processes of its own, one with a model and one without, shared by all."""

from __future__ import annotations

import asyncio
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from module0_profiling.course.parts import Use
from phase4_scheduler.async_llm import AsyncLLM
from phase4_scheduler.server import front
from phase4_scheduler.server.options import ServerOptions
from phase4_scheduler.server.serve import listen

COMMAND = [sys.executable, "-c", "from module0_profiling.cli import main; main()"]
PATIENCE = 120.0  # seconds: a loaded machine is slow, and a test that waits for a condition ends when it holds
KEY = "the-key-of-the-tests"


class Server:
    """`titan serve` in a process. `url` is known when it is ready."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self.log = log
        self._errors = log.open("wb")
        environment = {n: v for n, v in os.environ.items() if n != "TITAN_API_KEY"}
        environment["OMP_NUM_THREADS"] = "1"  # for so small a model more threads only wait for each other
        self.process = subprocess.Popen(
            [*COMMAND, "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )
        self.url = ""

    def wait_ready(self) -> Server:
        """Read the line that says where it listens."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE), f"not ready: {self.log.read_text()}"
        line = self.process.stdout.readline()
        found = re.search(r"is ready at (http://\S+) after", line)
        assert found, f"{line!r}, {self.log.read_text()}"
        self.url = found[1]
        return self

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self._errors.close()


@pytest.fixture(scope="session")
def use(use: Use) -> str:
    """Whose parts are tested, as `--use` takes it."""
    return str(use)


@pytest.fixture(scope="session")
def null_server(tmp_path_factory: pytest.TempPathFactory, use: str) -> Iterator[Server]:
    """Tokens without a model, with a key."""
    log = tmp_path_factory.mktemp("null") / "log"
    server = Server("null", "--api-key", KEY, "--settings", '{"step_seconds": 0.002}', "--use", use, log=log)
    yield server.wait_ready()
    assert server.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory, use: str) -> Iterator[Server]:
    """The shipped model in float32."""
    log = tmp_path_factory.mktemp("tiny") / "log"
    server = Server("titan-tiny", "--dtype", "float32", "--device", "cpu", "--use", use, log=log)
    yield server.wait_ready()
    assert server.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture
def null(null_server: Server) -> Iterator[httpx.Client]:
    """A client with the key."""
    with httpx.Client(
        base_url=null_server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE, trust_env=False
    ) as client:
        yield client


@pytest.fixture
def tiny(tiny_server: Server) -> Iterator[httpx.Client]:
    """A client of the shipped model."""
    with httpx.Client(base_url=tiny_server.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


@asynccontextmanager
async def serving(options: ServerOptions, settings: dict[str, Any]) -> AsyncIterator[tuple[AsyncLLM, str]]:
    """A server without a model in this process, for limits that the shared ones don't have: the client, and the URL."""
    llm = AsyncLLM("null", settings)
    await llm.start()
    stop = asyncio.Event()
    with listen("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        answering = asyncio.create_task(front.serve(llm, options, sock, stop))
        try:
            await llm.ready(PATIENCE)
            yield llm, url
        finally:
            stop.set()
            await llm.shutdown()
            await asyncio.wait_for(answering, PATIENCE)


async def until(holds: Any, seconds: float = PATIENCE) -> float:
    """Wait until a condition holds; returns how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "the condition never held"
        await asyncio.sleep(0.005)
    return time.monotonic() - began
