"""An event stream against a hand-driven ASGI server: order, errors, silence, and clients that stall or go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from phase4_scheduler.server.completion_answer import failed
from phase4_scheduler.server.errors import ApiError
from phase4_scheduler.server.sse import CUT, KEEP_ALIVE, EventStream, unless_gone
from phase4_scheduler.tests.server.conftest import until


class Peer:
    """The server's side of ASGI. `takes` is cleared while the client takes nothing; `leave` disconnects it."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.takes = asyncio.Event()
        self.takes.set()
        self._left = asyncio.Event()
        self.was_cut = False
        self.scope = {"type": "http", "path": "/v1/completions", "extensions": {CUT: self.cut}}

    async def receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.takes.wait()
        self.messages.append(message)

    def leave(self) -> None:
        self._left.set()

    def cut(self) -> None:
        self.was_cut = True
        self.leave()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)


class Closed:
    """Counts how often a stream was closed."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def stream(chunks: AsyncIterator[bytes], closed: Closed, **limits: float) -> EventStream:
    return EventStream(chunks, closed, failed, **{"stream_timeout": 30.0, **limits})


async def of(*found: bytes | Exception) -> AsyncIterator[bytes]:
    for one in found:
        if isinstance(one, Exception):
            raise one
        yield one


def test_one_send_for_each_chunk_and_one_end() -> None:
    async def run() -> None:
        peer, closed = Peer(), Closed()
        await stream(of(b"data: 1\n\n", b"data: 2\n\n"), closed)(peer.scope, peer.receive, peer.send)
        assert [m["type"] for m in peer.messages] == ["http.response.start", *["http.response.body"] * 3]
        assert peer.body == b"data: 1\n\ndata: 2\n\n"
        assert [m["more_body"] for m in peer.messages[1:]] == [True, True, False]
        headers = dict(peer.messages[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert closed.times == 1

    asyncio.run(run())


def test_an_error_before_the_first_chunk_has_its_own_status() -> None:
    async def run() -> None:
        peer, closed = Peer(), Closed()
        error = ApiError(503, "gone", retry_after=3)
        await stream(of(error), closed)(peer.scope, peer.receive, peer.send)
        assert peer.status == 503
        assert dict(peer.messages[0]["headers"])[b"retry-after"] == b"3"
        assert closed.times == 1

    asyncio.run(run())


def test_an_error_in_the_middle_is_an_event_and_then_done() -> None:
    async def run() -> None:
        peer, closed = Peer(), Closed()
        await stream(of(b"data: 1\n\n", ApiError(503, "gone")), closed)(peer.scope, peer.receive, peer.send)
        events = peer.body.split(b"\n\n")
        assert events[0] == b"data: 1"
        assert events[1].startswith(b'data: {"error":{"message":"gone"')
        assert events[2:] == [b"data: [DONE]", b""]

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_stream_at_once_even_before_the_first_chunk() -> None:
    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def run() -> None:
        peer, closed = Peer(), Closed()
        answering = asyncio.create_task(stream(never(), closed)(peer.scope, peer.receive, peer.send))
        await asyncio.sleep(0)
        peer.leave()
        await until(answering.done)
        assert closed.times == 1
        assert peer.messages == []

    asyncio.run(run())


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    async def run() -> None:
        peer, closed = Peer(), Closed()
        peer.takes.clear()
        answering = asyncio.create_task(
            stream(of(b"data: 1\n\n"), closed, stream_timeout=0.2)(peer.scope, peer.receive, peer.send)
        )
        await until(answering.done)
        assert peer.was_cut
        assert closed.times == 1

    asyncio.run(run())


@pytest.mark.parametrize("began", [True, False])
def test_silence_is_filled_with_comments(began: bool) -> None:
    async def run() -> None:
        peer, closed, go_on = Peer(), Closed(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            if began:
                yield b"data: 1\n\n"
            await go_on.wait()
            yield b"data: 2\n\n"

        answering = asyncio.create_task(stream(slow(), closed, keep_alive=0.05)(peer.scope, peer.receive, peer.send))
        await until(lambda: peer.body.count(KEEP_ALIVE) >= 2)
        go_on.set()
        await answering
        assert peer.status == 200
        assert peer.body.replace(KEEP_ALIVE, b"") == (b"data: 1\n\n" if began else b"") + b"data: 2\n\n"

    asyncio.run(run())


def test_whole_answers_are_cancelled_too_when_their_client_leaves() -> None:
    async def run() -> None:
        peer, closed, cancelled = Peer(), Closed(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        waiting = asyncio.create_task(unless_gone(peer.receive, work(), closed))
        await asyncio.sleep(0)
        peer.leave()
        with pytest.raises(ClientDisconnect):
            await waiting
        assert cancelled.is_set()
        assert closed.times == 1

    asyncio.run(run())
