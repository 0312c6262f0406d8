"""A client on a bare socket: it can leave in three ways, at any moment, and it keeps everything that it was told."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from phase4_scheduler.bench.http_parser import HttpError, ResponseParser
from phase4_scheduler.bench.sse import EventSplitter
from phase4_scheduler.measures.chaos_plan import Ask, How

PATIENCE = 120.0  # seconds for one answer; machines may be loaded
AGAIN = 0.5  # seconds at most before a refused request is sent again, whatever Retry-After says
REFUSED = (429, 503)


@dataclass
class Told:
    """One of the answers of a request.

    Attributes:
        text, token_ids: all of it. A whole chat answer has no token ids: None then.
        ends: every (finish_reason, stop_reason) that was told.
        is_late: something came after its end.
    """

    text: str = ""
    token_ids: list[int] | None = field(default_factory=list)
    ends: list[tuple[str, Any]] = field(default_factory=list)
    is_late: bool = False


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        status: of HTTP; 0: none came.
        headers: of the answer.
        sequences: by index.
        errors: messages, in a body or in the stream.
        events: of a stream.
        is_complete: a stream with [DONE], or a whole body.
        is_late: something came after [DONE].
        broken: how the connection ended, where it ended too early.
        attempts: how often it was sent.
        interrupted: how often a streamed answer ended with an error and was asked for again.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    sequences: dict[int, Told] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    events: int = 0
    is_complete: bool = False
    is_late: bool = False
    broken: str = ""
    attempts: int = 1
    interrupted: int = 0

    @property
    def is_refused(self) -> bool:
        """The server said that it would not take it now."""
        return self.status in REFUSED


class _Answer:
    """Takes the body of an answer."""

    def __init__(self, outcome: Outcome, stream: bool) -> None:
        self.outcome, self.is_stream = outcome, stream
        self._events = EventSplitter()
        self._whole = b""

    def take(self, status: int, piece: bytes) -> None:
        if status != 200 or not self.is_stream:
            self._whole += piece
            return
        for event in self._events.feed(piece):
            self.outcome.is_late |= self.outcome.is_complete
            self.outcome.events += 1
            if event == b"[DONE]":
                self.outcome.is_complete = True
            else:
                self._read(msgspec.json.decode(event))

    def end(self, parser: ResponseParser) -> None:
        outcome = self.outcome
        outcome.status, outcome.headers = parser.status, parser.headers
        if parser.complete and self._whole:
            self._read(msgspec.json.decode(self._whole))
            outcome.is_complete = True

    def _read(self, told: dict[str, Any]) -> None:
        if "error" in told:
            self.outcome.errors.append(str(told["error"]["message"]))
        for choice in told.get("choices", ()):
            sequence = self.outcome.sequences.setdefault(choice["index"], Told())
            words = choice.get("text", choice.get("delta", choice.get("message", {})))
            text = words if isinstance(words, str) else words.get("content") or ""
            ids = choice.get("token_ids", [] if "delta" in choice else None)
            sequence.is_late |= bool(sequence.ends)
            sequence.text += text
            if ids is None or sequence.token_ids is None:
                sequence.token_ids = None
            else:
                sequence.token_ids += ids
            if choice.get("finish_reason"):
                sequence.ends.append((choice["finish_reason"], choice.get("stop_reason")))


async def send(url: str, ask: Ask) -> Outcome:
    """Send a request once, and read until it ends or its client leaves."""
    outcome, leave = Outcome(), ask.leave
    answer = _Answer(outcome, bool(ask.fields["stream"]))
    parser = ResponseParser(answer.take)
    host, port = urlsplit(url).hostname, urlsplit(url).port
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        outcome.broken = str(error)
        return outcome
    try:
        writer.write(ask.encode(f"{host}:{port}"))
        async with asyncio.timeout(PATIENCE if leave is None else leave.seconds):
            while not parser.complete and (leave is None or outcome.events < leave.events):
                data = await reader.read(1 << 16)
                if not data:
                    parser.close()
                    break
                parser.feed(data)
    except (OSError, HttpError) as error:  # TimeoutError is an OSError
        if leave is None or not isinstance(error, TimeoutError):
            outcome.broken = f"{type(error).__name__}: {error}"
    finally:
        answer.end(parser)
        await go(reader, writer, "FIN" if leave is None or parser.complete else leave.how)
    return outcome


async def go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, how: How) -> None:
    """Leave. Who closes only its half waits for the server to do the same."""
    try:
        if how == "RST":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        elif how == "half-close":
            writer.write_eof()
            async with asyncio.timeout(PATIENCE):
                while await reader.read(1 << 16):
                    pass
    except (OSError, RuntimeError):  # the server was faster
        pass
    finally:
        writer.close()


async def insist(url: str, ask: Ask) -> Outcome:
    """Send a request, again while it is refused or the engine dies on it, as a patient client does."""
    attempts = interrupted = 0
    end = asyncio.get_running_loop().time() + PATIENCE
    while True:
        attempts += 1
        outcome = await send(url, ask)
        outcome.attempts, outcome.interrupted = attempts, interrupted
        died = outcome.status == 200 and bool(outcome.errors)
        if not (outcome.is_refused or died) or asyncio.get_running_loop().time() > end:
            return outcome
        interrupted += died
        await asyncio.sleep(min(AGAIN, float(outcome.headers.get("retry-after", AGAIN))))
