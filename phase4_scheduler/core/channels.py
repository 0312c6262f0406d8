"""Three ZeroMQ socket pairs over `ipc://`, in a directory that nobody else may enter.

    requests   PUSH -> PULL   client to engine
    outputs    PULL <- PUSH   engine to client
    control    PAIR -- PAIR   both ways

The client binds and the engine connects. Each engine process gets a new directory, so that what a dead engine has left
in a socket cannot be taken for a word of the next one's. A frame that is no message is logged and dropped: whoever can
write to these sockets can disturb a request, not end a process. (ShadowMQ, CVE-2025-30165 and relatives: sockets that
unpickled what came.)
"""

from __future__ import annotations

import asyncio
import logging
import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from phase4_scheduler.core import wire

_LOG = logging.getLogger(__name__)
_NAMES = ("requests", "outputs", "control")
_QUEUE = 10_000  # messages that a side may be behind; the engine waits then, the client refuses requests
_LARGEST = 256 << 20  # bytes of a frame; a longer one is not read at all
_LINGER = 2000  # milliseconds in which the engine's last words may leave it
_LONGEST_PATH = 100  # bytes of a socket's address: 107 on Linux, 103 on macOS
_AT_ONCE = 64  # messages that are handled before other tasks get their turn

Message = TypeVar("Message")


def private_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory with mode 0700, with a name so short that sockets in it can be addressed."""
    here = tempfile.gettempdir()
    too_long = len(here.encode()) + len("/titan-12345678/1234/requests") > _LONGEST_PATH
    return tempfile.TemporaryDirectory(prefix="titan-", dir="/tmp" if too_long else here, ignore_cleanup_errors=True)


class ClientChannels:
    """The client's ends.

    Args:
        context: of the client.
        directory: of this engine process alone; it exists.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: Path) -> None:
        self._requests, self._outputs, self._control = _open(
            context, directory, (zmq.PUSH, zmq.PULL, zmq.PAIR), bind=True, linger=0
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(
        self,
        on_outputs: Callable[[wire.Outputs], None],
        on_control: Callable[[wire.Hello | wire.Pulse | wire.Fault], None],
    ) -> None:
        """Call these with each message, in the running event loop, until `close`."""
        self._loop = asyncio.get_running_loop()
        self._readers = (
            _Reader(self._outputs, wire.decode_outputs, on_outputs, self._loop),
            _Reader(self._control, wire.decode_from_engine, on_control, self._loop),
        )

    def drain(self) -> None:
        """Handle everything that has arrived, now."""
        for reader in self._readers:
            reader.read(at_once=1 << 62)

    def send_request(self, message: wire.ToEngine) -> bool:
        """False when there is no engine at the other end, or one that has stopped reading."""
        return _send(self._requests, message)

    def send_stop(self) -> bool:
        """Tell the engine to end."""
        sent = _send(self._control, wire.Stop())
        if self._loop is not None:
            self._loop.call_soon(self._readers[1].read)  # sending may have swallowed the sign that something arrived
        return sent

    def writable(self) -> bool:
        """Whether `send_request` would send."""
        return bool(self._requests.poll(0, zmq.POLLOUT))

    def close(self) -> None:
        """Forget everything that was not read."""
        if self._loop is not None:
            for reader in self._readers:
                reader.close()
            self._loop = None
        for socket in (self._requests, self._outputs, self._control):
            socket.close()


class EngineChannels:
    """The engine's ends. Nothing here waits but `wait` and a `send_outputs` that is `_QUEUE` steps ahead of its reader.

    Args:
        directory: that the client has made.
    """

    def __init__(self, directory: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests, self._outputs, self._control = _open(
            self._context, directory, (zmq.PULL, zmq.PUSH, zmq.PAIR), bind=False, linger=_LINGER
        )
        self._poller = zmq.Poller()
        self._poller.register(self._requests, zmq.POLLIN)
        self._poller.register(self._control, zmq.POLLIN)

    def requests(self) -> list[wire.ToEngine]:
        """What the client wants, as far as it has arrived."""
        return _take(self._requests, wire.decode_request)

    def stopped(self) -> bool:
        """Whether the client has told the engine to end."""
        return bool(_take(self._control, wire.decode_to_engine))

    def wait(self, seconds: float) -> None:
        """Sleep until a message arrives, or so long."""
        self._poller.poll(max(0, math.ceil(seconds * 1000)))

    def send_outputs(self, outputs: wire.Outputs) -> None:
        """Send what a step has made; waits for a client that is far behind."""
        self._outputs.send(wire.encode(outputs))

    def send_control(self, message: wire.FromEngine) -> None:
        """Send a word about the engine; it is lost when the client does not read."""
        _send(self._control, message)

    def close(self) -> None:
        """Send what is left and close."""
        for socket in (self._requests, self._outputs, self._control):
            socket.close()
        self._context.term()


class _Reader:
    """Hands messages of one socket to a function when they arrive.

    ZeroMQ's descriptor tells that the state *may have changed*, once: whoever is woken has to read everything.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        decode: Callable[[bytes], Message],
        handle: Callable[[Message], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._socket, self._loop = socket, loop
        self._decode: Callable[[bytes], object] = decode
        self._handle: Callable[..., None] = handle
        self._fd = int(socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self.read)
        loop.call_soon(self.read)

    def read(self, at_once: int = _AT_ONCE) -> None:
        for _ in range(at_once):
            if self._socket.closed:
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if (message := _decoded(frame, self._decode)) is not None:
                self._handle(message)
        self._loop.call_soon(self.read)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)


def _open(
    context: zmq.Context[zmq.Socket[bytes]], directory: Path, kinds: tuple[int, int, int], *, bind: bool, linger: int
) -> list[zmq.Socket[bytes]]:
    sockets: list[zmq.Socket[bytes]] = []
    try:
        for name, kind in zip(_NAMES, kinds, strict=True):
            socket = context.socket(kind)
            sockets.append(socket)
            socket.set_hwm(_QUEUE)
            socket.setsockopt(zmq.LINGER, linger)
            socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST)
            address = f"ipc://{directory / name}"
            if bind:
                socket.bind(address)
            else:
                socket.connect(address)
    except zmq.ZMQError:
        for socket in sockets:
            socket.close()
        raise
    return sockets


def _send(socket: zmq.Socket[bytes], message: object) -> bool:
    with suppress(zmq.Again):
        socket.send(wire.encode(message), zmq.NOBLOCK)
        return True
    return False


def _take(socket: zmq.Socket[bytes], decode: Callable[[bytes], Message]) -> list[Message]:
    messages: list[Message] = []
    while True:
        try:
            frame = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return messages
        if (message := _decoded(frame, decode)) is not None:
            messages.append(message)


def _decoded(frame: bytes, decode: Callable[[bytes], Message]) -> Message | None:
    try:
        return decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _LOG.warning("dropped a frame of %d bytes that is no message: %s", len(frame), error)
        return None
