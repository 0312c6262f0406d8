"""What the gates of task 4.5 measure: a front on a real socket, the engine without a model behind it, real clients.

One run asks everything: an engine's process is started for it, with steps of 10 ms, and ended.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from module0_profiling.course import parts
from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.async_llm import AsyncLLM
from phase4_scheduler.bench.http_client import Address, Pool
from phase4_scheduler.bench.sse import EventSplitter
from phase4_scheduler.measures.gates_simulated import ROOM
from phase4_scheduler.server.options import ServerOptions

SETTINGS = {"step_seconds": 0.01, "max_num_seqs": 16, "max_model_len": 4096}
PATH = "/v1/completions"
PROMPT = "def greet("
CLIENTS, TOKENS, FEW = 8, 60, 20
ENDLESS = 4000  # tokens: 40 s, whose end nobody sees
LOST = 2.0  # seconds after which nobody looks any more whether a client that left was noticed
PATIENCE = 30.0  # seconds for what must happen, however slow the machine is


@dataclass(frozen=True)
class Front:
    """What one run found.

    Attributes:
        wrong: answers that differ from those that the engine gives without HTTP.
        answers: that were compared.
        first_share: of the time from the request to the last chunk with text, the part before the first.
        chunks: with text, of that answer of 60 tokens.
        together: most of eight clients' requests that were in the engine at a time.
        noticed: seconds until the engine worked for nobody, after its only clients had left; inf: blocks stayed taken.
    """

    wrong: int
    answers: int
    first_share: float
    chunks: int
    together: int
    noticed: float


@dataclass
class Heard:
    """An answer as it arrives."""

    stream: bool
    text: str = ""
    chunks: int = 0
    first: float = math.inf
    last: float = math.inf

    def __post_init__(self) -> None:
        self._splitter, self._body = EventSplitter(), b""

    def take(self, status: int, data: bytes) -> None:
        """Bytes of the body."""
        now = time.perf_counter()
        if not self.stream:
            self._body += data
            return
        for event in self._splitter.feed(data):
            if event != b"[DONE]" and (text := "".join(c["text"] for c in msgspec.json.decode(event)["choices"])):
                self.text, self.chunks = self.text + text, self.chunks + 1
                self.first, self.last = min(self.first, now), now

    def end(self) -> str:
        """The whole text."""
        return self.text if self.stream else msgspec.json.decode(self._body)["choices"][0]["text"]


def wrong_answers(use: Use) -> Measured:
    """Answers over HTTP, streamed or not, that are not the text that the engine gives without it."""
    found = _front(use)
    return Measured(found.wrong, f"{found.answers} answers, with stop strings and characters of several tokens")


def first_chunk(use: Use) -> Measured:
    """Share of the time of a streamed answer that passes before its first text is there."""
    found = _front(use)
    return Measured(found.first_share, f"{found.chunks} chunks of {TOKENS} tokens")


def served_together(use: Use) -> Measured:
    """Most requests in the engine at a time, of eight clients that come together."""
    return Measured(_front(use).together)


def clients_who_leave(use: Use) -> Measured:
    """Seconds for which the engine works on for clients that have left; 2 means that nobody noticed."""
    return Measured(_front(use).noticed, "one streams, one waits for the whole; both close the connection")


def _front(use: Use) -> Front:
    use = use.complete()
    files = [parts.path(ROOM, part, use) for part in parts.available(ROOM)]
    return _found(str(use), tuple((str(file), file.stat().st_mtime_ns) for file in files))


@lru_cache
def _found(use: str, stamps: tuple[Any, ...]) -> Front:
    """Kept until a part changes: the gates of the task ask the same."""
    return asyncio.run(_ask(use))


async def _ask(use: str) -> Front:
    async with _served(use) as (llm, address), Pool(address) as pool:
        wrong, answers = await _compare(llm, pool)
        begin = time.perf_counter()
        heard = await _post(pool, stream=True, max_tokens=TOKENS)
        share = (heard.first - begin) / (heard.last - begin)
        together = await _most_together(llm, pool)
        noticed = await _leave(llm, address)
        return Front(wrong, answers, share, heard.chunks, together, noticed)


@asynccontextmanager
async def _served(use: str) -> AsyncIterator[tuple[AsyncLLM, Address]]:
    """A front on a free port."""
    front = parts.resolve(ROOM, "server.front", Use.parse(use))
    llm, stop = AsyncLLM("null", SETTINGS, use=use), asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        await llm.start()
        serving = asyncio.create_task(front.serve(llm, ServerOptions(use=use), sock, stop))
        try:
            await llm.ready(PATIENCE)
            yield llm, Address("127.0.0.1", port, False, "")
        finally:
            await llm.shutdown()
            stop.set()
            await asyncio.wait_for(asyncio.gather(serving, return_exceptions=True), PATIENCE)


async def _compare(llm: AsyncLLM, pool: Pool) -> tuple[int, int]:
    """Answers that differ, and how many were compared."""
    wrong = answers = 0
    for seed, stop in ((3, []), (11, ["你好"]), (20, ["\n\nd"])):
        params = SamplingParams(max_tokens=FEW, seed=seed, stop=stop)
        right = (await llm.generate(PROMPT, params)).outputs[0].text
        for stream in (False, True):
            heard = await _post(pool, stream=stream, max_tokens=FEW, seed=seed, stop=stop)
            wrong, answers = wrong + (heard.end() != right), answers + 1
    return wrong, answers


async def _most_together(llm: AsyncLLM, pool: Pool) -> int:
    most = 0
    clients = [asyncio.create_task(_post(pool, stream=False, max_tokens=2 * FEW)) for _ in range(CLIENTS)]
    while not all(client.done() for client in clients):
        most = max(most, llm.in_flight)
        await asyncio.sleep(0.002)
    await asyncio.gather(*clients)
    return most


async def _leave(llm: AsyncLLM, address: Address) -> float:
    writers = []
    for stream in (True, False):
        _, writer = await asyncio.open_connection(address.host, address.port)
        content = _content(stream=stream, max_tokens=ENDLESS, ignore_eos=True)
        writer.write(
            f"POST {PATH} HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        await writer.drain()
        writers.append(writer)
        if stream:  # the other may have to wait for it
            await _until(lambda: llm.in_flight > 0 and llm.stats.running > 0, PATIENCE)
    for writer in writers:
        writer.close()
    seconds = await _until(lambda: not llm.in_flight, LOST)
    if seconds < LOST:
        free = await _until(lambda: llm.stats.kv_blocks_free == llm.stats.kv_blocks, PATIENCE)
        return seconds if free < PATIENCE else math.inf
    return seconds


async def _until(holds: Callable[[], bool], most: float) -> float:
    """Seconds until something is so, at most so many."""
    begin = time.perf_counter()
    while not holds() and time.perf_counter() - begin < most:
        await asyncio.sleep(0.005)
    return min(time.perf_counter() - begin, most)


async def _post(pool: Pool, **fields: Any) -> Heard:
    heard = Heard(fields["stream"])
    headers = {"Content-Type": "application/json"}
    head = await pool.request("POST", PATH, headers, _content(**fields), heard.take)
    if head.status != 200:
        raise AssertionError(f"POST {PATH} answered {head.status}")
    return heard


def _content(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "null", "prompt": PROMPT, **fields})
