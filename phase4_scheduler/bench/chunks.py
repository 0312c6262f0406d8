"""The stream of one answer: when its tokens came, and how many they were.

Only the fields that are needed are decoded, into structs: about a microsecond for each event. A chunk *carries tokens*
if it has text or token ids, or is an empty chunk of `/v1/completions` (a special token, or a part of a character). The
first chunk of a chat, which names the role, and the last, which has nothing but a finish reason, carry none.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from phase4_scheduler.bench.sse import EventSplitter

NOTHING = msgspec.Raw(b"null")


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    def carries_tokens(self) -> bool:
        if self.token_ids or self.text:
            return True
        if self.delta is not None:
            return bool(self.delta.content or self.delta.reasoning or self.delta.reasoning_content)
        return self.text is not None and self.finish_reason is None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = NOTHING


_decode = msgspec.json.Decoder(_Chunk).decode


class StreamReader:
    """Takes the body of a streamed answer.

    Attributes:
        times: when each chunk that carries tokens came, by `clock`.
        last: when the last chunk with a choice came; None before.
        token_ids: how many there were in all chunks, if the server sends them.
        prompt_tokens, output_tokens: as the server counted them; None if it did not say.
        finish_reason: of the answer.
        error: what the server sent in place of a chunk, or what is wrong with one.
        done: whether `[DONE]` came.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.times: list[float] = []
        self.last: float | None = None
        self.token_ids = 0
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.done = False
        self._clock = clock
        self._events = EventSplitter()

    def feed(self, data: bytes) -> None:
        """Take bytes as they arrive: events that arrive together came at the same time."""
        now = self._clock()
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self.done = True
                continue
            try:
                chunk = _decode(event)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.error = self.error or f"a chunk is not one of a completion ({error}): {event[:80]!r}"
                continue
            self._take(chunk, now)

    def _take(self, chunk: _Chunk, now: float) -> None:
        if chunk.choices:
            self.last = now
            choice = chunk.choices[0]
            if choice.carries_tokens():
                self.times.append(now)
            if choice.token_ids:
                self.token_ids += len(choice.token_ids)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
        if chunk.usage is not None:
            self.prompt_tokens, self.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if bytes(chunk.error) != b"null":
            self.error = self.error or message_of(bytes(chunk.error))


class _Envelope(msgspec.Struct):
    message: str | None = None
    error: msgspec.Raw = NOTHING
    detail: msgspec.Raw = NOTHING


def message_of(body: bytes) -> str:
    """The message in the body of an error, in whichever of the usual shapes; or its first bytes."""
    try:
        found = msgspec.json.decode(body, type=_Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode(errors="replace").strip().strip('"')
    if found.message is not None:
        return found.message
    for inner in (bytes(found.error), bytes(found.detail)):
        if inner != b"null":
            return message_of(inner)
    return body[:200].decode(errors="replace")
