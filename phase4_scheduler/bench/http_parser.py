"""An HTTP/1.1 response, byte by byte: pure logic without a socket (RFC 9112).

A general client wakes a task for each piece of a body; here a piece is handed to a function as it arrives, which costs
a few microseconds. That is what lets one core receive the streams of a fast server.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import TypeAlias

OnBody: TypeAlias = Callable[[int, bytes], None]  # the status of the response, a piece of its body
LONGEST_HEAD = 65_536  # bytes of status line and headers


class HttpError(RuntimeError):
    """What came is not HTTP/1.1, or ended too early."""


class _Next(Enum):
    HEAD = auto()
    LENGTH = auto()  # a body of known length
    CLOSE = auto()  # a body that ends with the connection
    CHUNK_SIZE = auto()
    CHUNK = auto()
    TRAILERS = auto()
    DONE = auto()


class ResponseParser:
    """One response.

    Attributes:
        status: of the response; 0 until it is known.
        headers: names in lower case; of a repeated one the last.
        complete: whether all of it has come.
    """

    def __init__(self, on_body: OnBody) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._on_body = on_body
        self._next = _Next.HEAD
        self._left = 0  # bytes of the body or chunk that are to come
        self._rest = b""

    @property
    def complete(self) -> bool:
        return self._next is _Next.DONE

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return self.complete and self.headers.get("connection", "").lower() != "close" and not self._rest

    def feed(self, data: bytes) -> None:
        """Take what has arrived.

        Raises:
            HttpError: it is not HTTP.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at: int | None = 0
        while at is not None and at < len(data) and self._next is not _Next.DONE:
            here = at
            at = self._step(data, here)
            if at is None:
                self._rest = data[here:]
                return
        if at is not None and at < len(data):
            self._rest = data[at:]  # bytes after the response: the connection is not used again

    def close(self) -> None:
        """The other side has closed the connection.

        Raises:
            HttpError: something was still to come.
        """
        if self._next is _Next.CLOSE:
            self._next = _Next.DONE
        if not self.complete:
            raise HttpError("the server closed the connection" + (" amid the answer" if self.status else ""))

    def _step(self, data: bytes, at: int) -> int | None:
        """Consume one element from `at`; its end, or None when it is not all there."""
        if self._next is _Next.CHUNK_SIZE:
            return self._chunk_size(data, at)
        if self._next is _Next.CHUNK:
            return self._chunk(data, at)
        if self._next is _Next.HEAD:
            return self._head(data, at)
        if self._next is _Next.TRAILERS:
            return self._trailer(data, at)
        if self._next is _Next.CLOSE:
            self._on_body(self.status, data[at:])
            return len(data)
        piece = data[at : at + self._left]
        self._left -= len(piece)
        if not self._left:
            self._next = _Next.DONE
        self._on_body(self.status, piece)
        return at + len(piece)

    def _chunk_size(self, data: bytes, at: int) -> int | None:
        end = data.find(b"\r\n", at)
        if end < 0:
            if len(data) - at > 1024:
                raise HttpError("a chunk without a size")
            return None
        digits = data[at:end].split(b";", 1)[0].strip()
        try:
            self._left = int(digits, 16)
        except ValueError:
            raise HttpError(f"{digits[:20]!r} is not the size of a chunk") from None
        self._next = _Next.CHUNK if self._left else _Next.TRAILERS
        return end + 2

    def _chunk(self, data: bytes, at: int) -> int | None:
        end = at + self._left
        if len(data) < end + 2:
            return None
        if data[end : end + 2] != b"\r\n":
            raise HttpError("a chunk is longer than its size")
        self._next = _Next.CHUNK_SIZE
        self._on_body(self.status, data[at:end])
        return end + 2

    def _trailer(self, data: bytes, at: int) -> int | None:
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        if end == at:
            self._next = _Next.DONE
        return end + 2

    def _head(self, data: bytes, at: int) -> int | None:
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            if len(data) - at > LONGEST_HEAD:
                raise HttpError(f"more than {LONGEST_HEAD} bytes of headers")
            return None
        first, *lines = data[at:end].decode("latin-1").split("\r\n")
        version, _, after = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not after[:3].isdigit():
            raise HttpError(f"{first[:40]!r} is not the beginning of an HTTP answer")
        status = int(after[:3])
        if 100 <= status < 200:
            return end + 4  # an interim answer: the real one follows
        self.status = status
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
        if version == "HTTP/1.0":
            self.headers.setdefault("connection", "close")
        self._next = self._body_follows()
        return end + 4

    def _body_follows(self) -> _Next:
        if self.status in (204, 304):
            return _Next.DONE
        if self.headers.get("transfer-encoding", "").lower().endswith("chunked"):
            return _Next.CHUNK_SIZE
        length = self.headers.get("content-length")
        if length is None:
            self.headers["connection"] = "close"
            return _Next.CLOSE
        if not length.isdigit():
            raise HttpError(f"content-length {length!r} is not a number")
        self._left = int(length)
        return _Next.LENGTH if self._left else _Next.DONE
