"""HTTP/1.1 over asyncio: a connection for each request that is under way, kept for the next one when it has ended."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from phase0_prototype.errors import UserError
from phase4_scheduler.bench.http_parser import HttpError, OnBody, ResponseParser

BUFFER = 16_384  # bytes read at once
KEEP_IDLE = 1.0  # seconds; servers close idle connections after a few, and a request must not meet that


@dataclass(frozen=True)
class Address:
    """Where a server listens, from a URL.

    Attributes:
        prefix: what stands before every path, without the slash at its end; "" mostly.
    """

    host: str
    port: int
    secure: bool
    prefix: str

    @classmethod
    def of(cls, url: str, *, option: str = "--base-url") -> Address:
        """Parse http://host:port; a path is put before every request's. `option` is what an error names.

        Raises:
            UserError: it is no such URL.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"{option} {url!r} is not the address of a server: give one like http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/"))

    def path(self, endpoint: str) -> str:
        """The path of an endpoint; a base URL that ends with /v1, as OpenAI's does, is not doubled."""
        if self.prefix.endswith("/v1") and endpoint.startswith("/v1/"):
            return self.prefix + endpoint[3:]
        if self.prefix.endswith("/v1"):
            return self.prefix[:-3] + endpoint
        return self.prefix + endpoint

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}{self.prefix}"


class Connection(asyncio.BufferedProtocol):
    """One connection; one request at a time.

    It lends the loop a buffer to read into: a plain Protocol gets a new one of 256 KiB for every read, which the
    allocator asks of the operating system each time.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(BUFFER))  # a slice of it is a place to write: TLS wants that
        self.used = 0.0  # when its last answer ended
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    async def exchange(self, request: bytes, on_body: OnBody) -> ResponseParser:
        """Send a request and hand the body of the answer to `on_body` as it comes; returns when it has all come.

        Raises:
            HttpError: the connection broke or the answer is no HTTP.
        """
        assert self._transport is not None
        parser = self._parser = ResponseParser(on_body)
        ended = self._ended = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            await ended
        except BaseException:
            self.abort()  # the rest of the answer is not wanted
            raise
        finally:
            self._parser = self._ended = None
        self.used = time.perf_counter()
        return parser

    @property
    def reusable(self) -> bool:
        """Whether it is open and has been idle for so short a time that the server will not have closed it."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and time.perf_counter() - self.used < KEEP_IDLE
        )

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._parser is None:
            self.abort()  # nothing was asked
            return
        try:
            self._parser.feed(bytes(self._buffer[:nbytes]))
        except Exception as error:
            self._end(error)
            return
        if self._parser.complete:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._parser is None:
            return
        try:
            self._parser.close()
        except HttpError as error:
            reason = f": {exc}" if exc else ""
            self._end(HttpError(f"{error}{reason}"))
        else:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


class Pool:
    """Connections to one server. `async with` closes them all."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[Connection] = []
        self._ssl = ssl.create_default_context() if address.secure else None

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def request(
        self, method: str, endpoint: str, headers: dict[str, str], body: bytes, on_body: OnBody
    ) -> ResponseParser:
        """One request on a connection of its own; returns the head of the answer when its body has ended.

        Raises:
            HttpError: see `Connection.exchange`.
            OSError: there is no way to the server.
        """
        connection = await self._connection()
        parser = await connection.exchange(self._encode(method, endpoint, headers, body), on_body)
        if parser.reusable and connection.reusable:
            self._idle.append(connection)
        else:
            connection.abort()
        return parser

    async def fetch(self, endpoint: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """GET: status and body."""
        pieces: list[bytes] = []
        parser = await self.request("GET", endpoint, headers, b"", lambda _, piece: pieces.append(piece))
        return parser.status, b"".join(pieces)

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
            connection.abort()
        _, made = await asyncio.get_running_loop().create_connection(
            Connection, self.address.host, self.address.port, ssl=self._ssl
        )
        return made

    def _encode(self, method: str, endpoint: str, headers: dict[str, str], body: bytes) -> bytes:
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        given = {"Host": f"{host}:{self.address.port}", "Accept-Encoding": "identity", **headers}
        if method != "GET":
            given |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        return f"{method} {self.address.path(endpoint)} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body
