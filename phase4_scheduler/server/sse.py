"""Server-sent events: one `send` for each step, keep-alive comments, and an end for clients that have gone or stall.

A client that closes its side, resets, or half-closes ends the stream within a moment: one task writes, another waits
for the disconnect. (Asking `is_disconnected` between chunks finds out only when there is a chunk.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phase4_scheduler.server.errors import ApiError, response_of

KEEP_ALIVE = b": keep-alive\n\n"
CUT = "titan.cut"  # extension of the scope: ends the connection without waiting for its buffer
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_log = logging.getLogger("titan.server")
_T = TypeVar("_T")


async def gone(receive: Receive) -> None:
    """Returns when the client is gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T], close: Callable[[], None]) -> _T:
    """The result of `work`, which is cancelled when the client goes; then `close` is called in any case.

    Raises:
        ClientDisconnect: it went.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end(working, leaving)
        close()


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """An answer that is a stream of events.

    The headers wait for the first chunk, so that an error before it has its own status.

    Args:
        chunks: whole events.
        close: called once, at the end, however it comes.
        failed: the events that tell of an error in the middle.
        stream_timeout: seconds after which a client that takes nothing is cut off.
        keep_alive: seconds of silence after which a comment is sent; 0: never.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        close: Callable[[], None],
        failed: Callable[[ApiError], bytes],
        *,
        stream_timeout: float,
        keep_alive: float = 0.0,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._chunks, self._close, self._failed = chunks, close, failed
        self._stream_timeout, self._keep_alive = stream_timeout, keep_alive
        self._started = False
        self._sending: float | None = None  # since when the client has not taken a chunk
        self._sent = 0.0  # when the last one was taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        loop = asyncio.get_running_loop()
        self._sent = loop.time()
        writing = asyncio.ensure_future(self._write(scope, receive, send))
        leaving = asyncio.ensure_future(gone(receive))
        look = min(self._stream_timeout / 4, self._keep_alive or self._stream_timeout)
        try:
            while not (writing.done() or leaving.done()):
                await asyncio.wait((writing, leaving), timeout=look, return_when=asyncio.FIRST_COMPLETED)
                if self._sending is not None:
                    if loop.time() - self._sending >= self._stream_timeout and not writing.done():
                        _log.warning("a client took nothing for %g s and was cut off", self._stream_timeout)
                        await self._cut(scope, leaving)
                        break
                elif self._keep_alive and not writing.done() and loop.time() - self._sent >= self._keep_alive * 0.99:
                    try:
                        async with asyncio.timeout(self._stream_timeout):
                            await self._send(send, KEEP_ALIVE)
                    except TimeoutError:
                        continue  # the next look finds it
            if writing.done():
                writing.result()
        finally:
            await _end(writing, leaving)
            self._close()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        time = asyncio.get_running_loop().time
        try:
            async for chunk in self._chunks:
                if not self._started:
                    await self._send(send, chunk)
                    continue
                self._sending = time()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._sending, self._sent = None, time()
        except ApiError as error:
            if not self._started:
                await response_of(error, scope["path"])(scope, receive, send)
                return
            await self._send(send, self._failed(error))
        if not self._started:
            await self._send(send, b"")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunk: bytes) -> None:
        """A chunk, after the headers if they are still to be sent."""
        time = asyncio.get_running_loop().time
        self._sending = time()
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._sending, self._sent = None, time()

    async def _cut(self, scope: Scope, leaving: asyncio.Future[None]) -> None:
        cut: Callable[[], None] | None = scope.get("extensions", {}).get(CUT)
        if cut is not None:
            cut()
            await asyncio.wait((leaving,), timeout=1.0)
