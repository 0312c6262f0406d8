"""The answer to one request as it arrives: pieces of text for its reader, and exactly one end.

Whatever arrives between two looks of the reader is merged, so a reader that is slow costs the memory of the answer and
not more. Text is made here, in the client, while the engine computes: characters that are spread over tokens are held
back until they are whole, and so is what may become a stop string (detokenizer.py of phase 0). Text that was handed out
is never taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from phase0_prototype.outputs import PositionLogprobs, RequestMetrics, RequestOutput
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tokenizer import Tokenizer
from phase4_scheduler.core.deltas import ALL
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.core.wire import Delta
from phase4_scheduler.output_sequence import OutputSequence, Piece, named

__all__ = ["Piece", "Stream"]


class Stream:
    """An async iterator of lists of pieces, one piece at most of each sequence. Made by `AsyncLLM.submit`.

        async with llm.submit("def add(", params) as stream:
            async for pieces in stream:
                print(pieces[0].text, end="")

    Leaving the block cancels what is not finished; without one, call `cancel` when you stop reading. The iterator
    raises `EngineError` once, after everything that had arrived, when the engine died.

    Args:
        request_id: as the user knows it.
        prompt: its text, if there was one.
        prompt_token_ids: its tokens.
        params: what was asked for.
        tokenizer: None leaves the text empty.
        abort: tells the engine that a sequence, or with `ALL` the whole request, is of no interest any more.
        on_end: called once.

    Attributes:
        prompt_logprobs: as in `RequestOutput`; complete when the first piece comes.
        queued: seconds from its arrival in the engine to its first step; None before.
        preemptions: how often its sequences lost their memory.
        finished: whether there will be no more.
        taken: whether the reader was given anything.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        *,
        abort: Callable[[int], None],
        on_end: Callable[[], None],
    ) -> None:
        self.request_id, self.prompt, self.prompt_token_ids, self.params = request_id, prompt, prompt_token_ids, params
        self._tokenizer, self._abort, self._on_end = tokenizer, abort, on_end
        self._arrival = time.perf_counter()
        self._finished_at: float | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._whole = False  # the reader wants to be woken at the end only
        self._error: EngineError | None = None
        self.finished = self.taken = False
        self.begin_again()

    def begin_again(self) -> None:
        """Forget what has arrived, which nobody has seen: another engine answers from the beginning."""
        assert not self.taken and not self.finished
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self.queued: float | None = None
        self.preemptions = 0
        self._first_token: float | None = None
        self._pending: dict[int, Piece] = {}
        self._sequences = [
            OutputSequence(index, self.prompt_token_ids, self.params, self._tokenizer) for index in range(self.params.n)
        ]
        self._open = self.params.n

    # --- the reader's side ---

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Piece]:
        while True:
            if self._pending:
                pieces, self._pending, self.taken = list(self._pending.values()), {}, True
                return pieces
            self._raise_error()
            if self.finished:
                raise StopAsyncIteration
            await self._wait()

    async def output(self) -> RequestOutput:
        """The whole answer, when it is there, at a lower cost than reading its pieces. Raises EngineError."""
        self._whole = True
        while not self.finished:
            await self._wait()
        self._pending, self.taken = {}, True
        self._raise_error()
        return self.so_far()

    def so_far(self) -> RequestOutput:
        """Everything until now, read or not."""
        return RequestOutput(
            self.request_id,
            self.prompt,
            list(self.prompt_token_ids),
            self.prompt_logprobs,
            [sequence.so_far() for sequence in self._sequences],
            self.finished,
            self.metrics,
        )

    @property
    def metrics(self) -> RequestMetrics:
        """When it was submitted, got its first token and ended: seconds of `time.perf_counter`."""
        return RequestMetrics(self._arrival, self._first_token, self._finished_at)

    def cancel(self, reason: str | None = None) -> None:
        """End it now with finish_reason "abort" and this stop_reason; nothing happens if it has ended."""
        if self.finished:
            return
        self._abort(ALL)
        for sequence in self._sequences:
            if sequence.finish_reason is None:
                self._put(sequence.abort(reason))
        self._end()

    async def aclose(self) -> None:
        """`cancel`, for `contextlib.aclosing`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    # --- the engine's side ---

    def take(self, delta: Delta) -> None:
        """Something new. What comes after a sequence's end is dropped."""
        if self.finished:
            return
        if delta.queued is not None and self.queued is None:
            self.queued = delta.queued
        if delta.prompt_logprobs is not None:
            start, values = delta.prompt_logprobs
            known = (self.prompt_logprobs or [None])[:start]
            self.prompt_logprobs = known + [named(one, self._tokenizer) for one in values]
        if delta.token_ids and self._first_token is None:
            self._first_token = time.perf_counter()
        for sequence in self._sequences if delta.index == ALL else [self._sequences[delta.index]]:
            if sequence.finish_reason is None and (delta.token_ids or delta.finish_reason is not None):
                self._take_into(sequence, delta)
        if not self._open:
            self._end()

    def _take_into(self, sequence: OutputSequence, delta: Delta) -> None:
        piece = sequence.take(delta)
        self._put(piece)
        self.preemptions += delta.preemptions
        if piece.finish_reason is not None:
            self._open -= 1
            if delta.finish_reason is None:  # a stop string: the engine does not know
                self._abort(piece.index)

    def fail(self, error: EngineError) -> None:
        """There will be no more, and it is not the request's fault."""
        if not self.finished:
            self._error = error
            self._end()

    # --- within ---

    def _put(self, piece: Piece) -> None:
        if self._whole:
            return
        waiting = self._pending.get(piece.index)
        if waiting is None:
            self._pending[piece.index] = piece
        else:
            waiting.extend(piece)
        self._wake()

    def _end(self) -> None:
        self.finished, self._finished_at = True, time.perf_counter()
        self._wake()
        self._on_end()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
