"""The streams of one HTTP request, one for each prompt, as one stream of (prompt, pieces)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.server.errors import ApiError
from phase4_scheduler.server.ledger import Ticket

if TYPE_CHECKING:
    from phase4_scheduler.async_llm import Stream
    from phase4_scheduler.output_stream import Piece

_GRAVE = {"error": 2, "abort": 1}  # a prompt whose sequences end differently is counted under the worst


class Job:
    """What an HTTP request waits for.

    Args:
        streams: of the engine's client, one for each prompt.
        tickets: their entries in the ledger.
        params: of all of them.

    Attributes:
        prompt_tokens, completion_tokens: for the usage; the second grows.
    """

    def __init__(self, streams: Sequence[Stream], tickets: Sequence[Ticket], params: SamplingParams) -> None:
        self.streams, self.params, self._tickets = streams, params, tickets
        self.prompt_tokens = sum(len(s.prompt_token_ids) for s in streams)
        self.completion_tokens = 0
        self._worst = ["stop"] * len(streams)

    async def pieces(self) -> AsyncIterator[tuple[int, list[Piece]]]:
        """All that comes, as (place of the prompt, pieces), until everything has ended.

        Raises:
            ApiError: 503 when the engine is gone, 500 when a sequence fails.
        """
        try:
            if len(self.streams) == 1:
                async for pieces in self.streams[0]:
                    self._record(0, pieces)
                    yield 0, pieces
                self._tickets[0].end(self._worst[0])
            else:
                async for place, pieces in self._merged():
                    yield place, pieces
        except EngineError as error:
            self._fail()
            raise ApiError(503, f"{error}: try again", code="engine_error", retry_after=error.retry_after) from None
        except ApiError:
            self._fail()
            raise

    def close(self) -> None:
        """Nobody waits any more: what still runs is cancelled. Does nothing after the end."""
        for stream, ticket in zip(self.streams, self._tickets, strict=True):
            if ticket.is_open:
                stream.cancel()
                ticket.end("abort")

    def _record(self, place: int, pieces: list[Piece]) -> None:
        tokens = 0
        for piece in pieces:
            tokens += len(piece.token_ids)
            if piece.finish_reason is not None:
                if piece.finish_reason == "error":
                    raise ApiError(500, f"generation failed: {piece.stop_reason or 'no reason known'}", code="failed")
                if piece.finish_reason == "abort" and not (tokens or self._tickets[place].has_begun):
                    self._worst[place] = "abort"
                    raise _aborted(piece.stop_reason)
                if _GRAVE.get(piece.finish_reason, 0) >= _GRAVE.get(self._worst[place], 0):
                    self._worst[place] = piece.finish_reason
        self.completion_tokens += tokens
        if tokens:
            self._tickets[place].took(tokens, self.streams[place].queued)

    def _fail(self) -> None:
        for place, (stream, ticket) in enumerate(zip(self.streams, self._tickets, strict=True)):
            if ticket.is_open:
                stream.cancel()
                ticket.end("abort" if self._worst[place] == "abort" else "error")

    async def _merged(self) -> AsyncIterator[tuple[int, list[Piece]]]:
        """Of several streams, in the order in which things come. A stream that is not read merges its own pieces."""
        arrived: asyncio.Queue[tuple[int, list[Piece] | BaseException | None]] = asyncio.Queue(len(self.streams))

        async def pump(place: int, stream: Stream) -> None:
            try:
                async for pieces in stream:
                    await arrived.put((place, pieces))
                await arrived.put((place, None))
            except EngineError as error:
                await arrived.put((place, error))

        pumps = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(self.streams)]
        try:
            running = len(pumps)
            while running:
                place, found = await arrived.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    self._tickets[place].end(self._worst[place])
                    running -= 1
                else:
                    self._record(place, found)
                    yield place, found
        finally:
            for task in pumps:
                task.cancel()


def _aborted(reason: int | str | None) -> ApiError:
    """A request that ended before its first token: nothing can be given but the reason."""
    if reason == "deadline":
        return ApiError(408, "the request's timeout passed before its first token: give more time", code="deadline")
    why = reason or "the server is shutting down"
    return ApiError(503, f"the request was aborted before its first token ({why}): try again", retry_after=2)
