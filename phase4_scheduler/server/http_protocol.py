"""HTTP/1.1 with limits that uvicorn has not: on the size of headers, and on the time that they may take.

uvicorn's parser by httptools keeps headers of any size in memory (the failure of CVE-2025-48956) and waits for them
for ever. Its other parser, h11, has a limit and answers 400; it is what `titan serve` uses where httptools is missing.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from phase4_scheduler.server.errors import ApiError, body_of
from phase4_scheduler.server.options import ServerOptions
from phase4_scheduler.server.sse import CUT

_LINGER = 1.0  # seconds in which what a refused client still sends is thrown away, so that it sees the answer
_PHRASES = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


def limited_protocol(options: ServerOptions) -> type[asyncio.Protocol]:
    """The class that uvicorn makes an object of for each connection."""

    class Limited(LimitedProtocol):
        max_header_bytes = options.max_header_bytes
        header_timeout = options.header_timeout
        stall_timeout = options.stream_timeout

    return Limited


class LimitedProtocol(HttpToolsProtocol):
    """A connection. Made by `limited_protocol`, which sets the limits."""

    max_header_bytes: int
    header_timeout: float
    stall_timeout: float

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._size = 0  # bytes of the headers that are being read
        self._reading_headers = self._refused = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that connects and says nothing is let go, and one whose machine is gone is noticed."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.header_timeout, self._too_slow)
        found = transport.get_extra_info("socket")
        if found is not None and hasattr(socket, "TCP_USER_TIMEOUT") and found.family != socket.AF_UNIX:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.stall_timeout * 1000))

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count before the parser keeps it: a header that has no end would stay inside it."""
        if self._refused:
            return
        before = self._size
        super().data_received(data)
        if self._reading_headers and not self._refused:
            self._size = max(self._size, before + len(data))
            self._check_size()

    def on_message_begin(self) -> None:
        """The first bytes of a request."""
        self._size, self._reading_headers = 0, True
        if self._timer is None:
            self._timer = self.loop.call_later(self.header_timeout, self._too_slow)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._size += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._size += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All of them: the request begins, unless they are too large."""
        self._stop_timer()
        self._reading_headers = False
        self._check_size()
        if not self._refused:
            self.scope["extensions"] = {CUT: self.transport.abort}  # type: ignore[dict-item]  # ours holds a function
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request's end."""
        if not self._refused:
            super().on_message_complete()

    def _check_size(self) -> None:
        if self._size > self.max_header_bytes and not self._refused:
            self._refuse(
                ApiError(431, f"the headers are larger than {self.max_header_bytes} bytes: send fewer or shorter ones")
            )

    def _too_slow(self) -> None:
        self._timer = None
        if self._reading_headers:
            self._refuse(ApiError(408, f"the headers had not arrived after {self.header_timeout:g} s"))
        elif self.cycle is None:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer by hand: there is no request that an application could answer."""
        self._refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # a pipelined request: its answer has no turn
            self.transport.close()
            return
        body = msgspec.json.encode(body_of(error))
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (error.status, _PHRASES[error.status].encode(), len(body), body)
        )
        self.transport.write_eof()
        self.loop.call_later(_LINGER, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
