"""Bombs, slow clients, slow readers and clients that leave, on raw sockets; the queue and its Retry-After."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from phase4_scheduler.async_llm import AsyncLLM
from phase4_scheduler.server.options import ServerOptions
from phase4_scheduler.tests.server.conftest import PATIENCE, serving, until

ROUTE = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LIMITS = ServerOptions(max_body_bytes=20_000, max_header_bytes=5_000, body_timeout=0.5, header_timeout=0.5)


def post(**fields: Any) -> bytes:
    body = json.dumps({"prompt": "x", **fields}).encode()
    return ROUTE + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=1 << 24)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status(url: str, *sent: bytes) -> int:
    """What a request is answered with, though its sender goes on sending."""
    async with connected(url) as (reader, writer):
        sending = asyncio.create_task(_send(writer, sent))
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
        sending.cancel()
        return int(line.split()[1]) if line else 0


async def _send(writer: asyncio.StreamWriter, sent: tuple[bytes, ...]) -> None:
    for one in sent:
        writer.write(one)
        await writer.drain()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_bombs_and_slow_clients_get_their_status_and_the_server_lives() -> None:
    """F10."""

    async def work() -> None:
        async with serving(LIMITS, {}) as (_, url):
            chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
            cases = {
                "said to be large": (413, [ROUTE + b"Content-Length: 20001\r\n\r\n" + b"x" * 20001]),
                "said to be huge": (413, [ROUTE + b"Content-Length: 99999999999\r\n\r\n", *[b"x" * 65536] * 200]),
                "large in chunks": (413, [ROUTE + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 200]),
                "slow body": (408, [ROUTE + b"Content-Length: 10\r\n\r\n{"]),
                "slow header": (408, [ROUTE]),
                "one huge header": (431, [ROUTE + b"X-A: " + b"a" * 6000 + b"\r\n\r\n"]),
                "many headers": (431, [ROUTE, *[b"X-A: b\r\n"] * 2000]),
                "a header without end": (431, [ROUTE + b"X-A: ", *[b"a" * 65536] * 200]),
                "a path without end": (431, [b"GET /", *[b"a" * 65536] * 200]),
                "no HTTP": (400, [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"]),
            }
            found = await asyncio.gather(*(status(url, *sent) for _, sent in cases.values()))
            assert dict(zip(cases, found, strict=True)) == {name: wanted for name, (wanted, _) in cases.items()}
            assert await status(url, post(max_tokens=1)) == 200

    run(work())


def test_a_connection_that_says_nothing_is_let_go() -> None:
    async def work() -> None:
        async with serving(LIMITS, {}) as (_, url), connected(url) as (reader, _writer):
            assert await asyncio.wait_for(reader.read(), PATIENCE) == b""

    run(work())


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


LEAVES: dict[str, Callable[[asyncio.StreamWriter], None]] = {
    "FIN": lambda writer: writer.close(),
    "half-close": lambda writer: writer.write_eof(),
    "RST": _reset,
}


def test_a_client_that_leaves_is_cancelled_within_a_second_whatever_it_waited_for() -> None:
    """F1. {queued, mid-prefill, mid-decode} x {stream, whole, n > 1, several prompts} x {FIN, half-close, RST}."""

    async def work() -> None:
        settings = {"max_num_seqs": 4, "max_model_len": 4096, "step_seconds": 0.005, "max_num_batched_tokens": 16}
        async with serving(ServerOptions(log_interval=0), settings) as (llm, url):
            await until(lambda: llm.stats.kv_blocks > 0)
            free = llm.stats.kv_blocks_free
            shapes: list[dict[str, Any]] = [{}, {"stream": True}, {"stream": True, "n": 2}, {"prompt": ["a", "b"]}]
            for name, leave in LEAVES.items():
                for shape in shapes:
                    await _leave_in(llm, url, leave, {"max_tokens": 4000, **shape}, lambda: llm.stats.running > 0)
                long = {"prompt": [5] * 3000, "max_tokens": 900, "stream": True}
                await _leave_in(llm, url, leave, long, lambda: llm.stats.running > 0)
                await until(lambda: not llm.stats.running and llm.stats.kv_blocks_free == free)
                async with connected(url) as (_, first):
                    first.write(post(max_tokens=4000, n=4))  # fills the batch
                    await until(lambda: llm.stats.running == 4)
                    await _leave_in(llm, url, leave, {"max_tokens": 5}, lambda: llm.stats.waiting > 0, open_before=1)
                    LEAVES["FIN"](first)
                    await until(lambda: not llm.in_flight)
                await until(lambda: not llm.stats.running and llm.stats.kv_blocks_free == free)
                assert llm.state == "ready", name

    run(work())


async def _leave_in(
    llm: AsyncLLM,
    url: str,
    leave: Callable[[asyncio.StreamWriter], None],
    fields: dict[str, Any],
    state: Callable[[], bool],
    open_before: int = 0,
) -> None:
    """Ask, leave when `state` holds, and see that the request is gone soon after."""
    async with connected(url) as (_, writer):
        writer.write(post(**fields))
        await until(lambda: llm.in_flight > open_before and state())
        leave(writer)
        took = await until(lambda: llm.in_flight == open_before)
    assert took < 1.0, fields


def test_a_reader_that_takes_nothing_is_cut_off_and_costs_little_memory() -> None:
    async def work() -> None:
        options = ServerOptions(stream_timeout=1.0, log_interval=0)
        async with serving(options, {"step_seconds": 0.0, "max_model_len": 1 << 20}) as (llm, url):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", int(url.rpartition(":")[2])))
            with sock:
                asked = post(max_tokens=1_000_000, stream=True, return_token_ids=True)
                await asyncio.get_running_loop().sock_sendall(sock, asked)
                await until(lambda: llm.in_flight == 1)
                await until(lambda: llm.in_flight == 0)
            assert await status(url, post(max_tokens=1)) == 200

    run(work())


@pytest.mark.parametrize(
    ("bounds", "filler"),
    [
        ({"max_num_queued_reqs": 2}, {"prompt": "x"}),
        ({"max_num_queued_tokens": 40}, {"prompt": [5] * 20}),
    ],
)
def test_a_full_queue_is_429_with_the_time_that_the_backlog_takes(
    bounds: dict[str, int], filler: dict[str, Any]
) -> None:
    async def work() -> None:
        settings = {"max_num_seqs": 2, "step_seconds": 0.01, "max_model_len": 2048}
        async with (
            serving(ServerOptions(log_interval=0, **bounds), settings) as (llm, url),
            httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client,
        ):

            async def ask(tokens: int) -> httpx.Response:
                return await client.post("/v1/completions", json={**filler, "max_tokens": tokens, "ignore_eos": True})

            waiting = [asyncio.create_task(ask(200)) for _ in range(2)]
            await until(lambda: llm.stats.running == 2 and llm.stats.generated_tokens >= 4)
            waiting += [asyncio.create_task(ask(2)) for _ in range(2)]
            await until(lambda: llm.in_flight == 4)
            refused = await ask(10)
            assert refused.status_code == 429, refused.text
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            anthropic = {"messages": [{"role": "user", "content": "x " * 30}], "max_tokens": 4}
            assert (await client.post("/v1/messages", json=anthropic)).json()["error"]["type"] == "rate_limit_error"
            answers = await asyncio.gather(*waiting)
            assert [answer.status_code for answer in answers] == [200] * 4, "who was let in is served"
            assert (await ask(2)).status_code == 200, "and the next one"

    run(work())


def test_a_request_whose_time_is_over_before_its_first_token_is_408() -> None:
    async def work() -> None:
        settings = {"max_num_seqs": 1, "step_seconds": 0.01}
        async with (
            serving(ServerOptions(log_interval=0), settings) as (llm, url),
            httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client,
            connected(url) as (_, writer),
        ):
            writer.write(post(max_tokens=5000))
            await until(lambda: llm.stats.running == 1)
            for stream in (False, True):
                asked = {"prompt": "x", "timeout": 0.1, "stream": stream}
                assert (await client.post("/v1/completions", json=asked)).status_code == 408
            writer.close()
            await until(lambda: not llm.in_flight)
            late = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 5000, "timeout": 0.3})
            choice = late.json()["choices"][0]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("abort", "deadline")
            assert choice["text"]

    run(work())


def test_a_dead_engine_is_one_clean_error_for_each_and_then_the_server_serves_again() -> None:
    """F5, as clients see it."""

    async def work() -> None:
        async with (
            serving(ServerOptions(log_interval=0), {"step_seconds": 0.01}) as (llm, url),
            httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client,
        ):
            async with connected(url) as (reader, writer):
                writer.write(post(max_tokens=5000, stream=True))
                await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE)
                assert llm.pid is not None
                os.kill(llm.pid, signal.SIGKILL)
                rest = await asyncio.wait_for(reader.readuntil(b"data: [DONE]\n\n"), PATIENCE)
                assert rest.count(b'data: {"error":{') == 1
            assert (await client.get("/health")).status_code == 200
            await until(lambda: llm.state == "ready")
            assert (await client.get("/ready")).status_code == 200
            assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
            assert (await client.get("/load")).json()["restarts"] == 1

    run(work())
