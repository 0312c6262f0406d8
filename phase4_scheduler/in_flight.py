"""The requests that have not ended, and what becomes of them when the engine answers, dies or is replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from phase4_scheduler.core import wire
from phase4_scheduler.core.deltas import ALL
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.output_stream import Stream

_LOG = logging.getLogger(__name__)
_LATE = 1.0  # seconds after a deadline in which the engine may say itself that it has passed
_SEND_AGAIN = 0.1  # seconds after which an engine that was not reading is tried again


class _Open:
    """A request that has not ended."""

    def __init__(self, message: wire.Add, stream: Stream, timer: asyncio.TimerHandle | None) -> None:
        self.message, self.stream, self.timer = message, stream, timer
        self.replayed = False


class InFlight:
    """The open requests of a client.

    Args:
        send: gives a message to the engine; False where there is none that reads.

    Attributes:
        empty: set while no request is open.
    """

    def __init__(self, send: Callable[[wire.ToEngine], bool]) -> None:
        self._send = send
        self._open: dict[str, _Open] = {}  # by the id on the wire: a number, never used twice
        self._names: dict[str, str] = {}  # those numbers, by the user's ids
        self._unsent: list[str] = []  # aborts that the engine has not read
        self.empty = asyncio.Event()
        self.empty.set()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, message: wire.Add, stream: Stream) -> None:
        """A request that was sent. Its time is also kept here, for an engine that hangs."""
        timer = None
        if message.timeout is not None:
            timer = asyncio.get_running_loop().call_later(message.timeout + _LATE, stream.cancel, "deadline")
        self._open[message.request_id] = _Open(message, stream, timer)
        self._names[stream.request_id] = message.request_id
        self.empty.clear()

    def forget(self, number: str) -> None:
        """A request has ended."""
        one = self._open.pop(number)
        del self._names[one.stream.request_id]
        if one.timer is not None:
            one.timer.cancel()
        if not self._open:
            self.empty.set()

    def cancel(self, name: str) -> None:
        """End the request that the user calls so, if it is open."""
        if (number := self._names.get(name)) is not None:
            self._open[number].stream.cancel()

    def cancel_all(self, reason: str) -> None:
        """End every request."""
        for one in list(self._open.values()):
            one.stream.cancel(reason)

    def abort(self, number: str, index: int) -> None:
        """Tell the engine that a request, or one of its sequences, is of no interest: now, or when it reads again."""
        single = index == ALL or self._open[number].stream.params.n == 1
        self._unsent.append(number if single else f"{number}.{index}")
        if len(self._unsent) == 1:
            self._send_aborts()

    def deliver(self, outputs: wire.Outputs) -> None:
        """Each delta to its stream."""
        for delta in outputs.deltas:
            one = self._open.get(delta.request_id)
            if one is None:  # it has ended here
                continue
            try:
                one.stream.take(delta)
            except Exception:  # of one request: the others are waiting
                _LOG.exception("request %s: what came from the engine can't be read", one.stream.request_id)
                self.abort(delta.request_id, ALL)
                one.stream.fail(EngineError("the engine's answer can't be read"))

    def send_again(self) -> None:
        """A new engine: those that are open were waiting for it."""
        for one in list(self._open.values()):
            if not self._send(one.message):
                one.stream.fail(EngineError("the engine does not read its requests", 1.0))

    def bereave(self, error: EngineError) -> None:
        """The engine died. Who has seen nothing waits for the next one, but only once: it may have been the cause."""
        self._unsent.clear()
        for one in list(self._open.values()):
            if one.stream.taken or one.replayed:
                one.stream.fail(EngineError(str(error), error.retry_after))
            else:
                one.replayed = True
                one.stream.begin_again()

    def fail_all(self, message: str, retry_after: float | None) -> None:
        """There is no engine to wait for."""
        self._unsent.clear()
        for one in list(self._open.values()):
            one.stream.fail(EngineError(message, retry_after))

    def _send_aborts(self) -> None:
        if self._unsent and self._send(wire.Abort(self._unsent)):
            self._unsent = []
        if self._unsent:
            asyncio.get_running_loop().call_later(_SEND_AGAIN, self._send_aborts)
