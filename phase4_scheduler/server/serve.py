"""`titan serve`: two processes, from the command line to the last signal.

The engine's process is started first and loads while this one imports its web framework; the port listens at once and
/ready says when requests are taken. SIGTERM or SIGINT drain: new requests are 503, those that run may finish; a second
signal, or the time-out, aborts them. Nothing is left behind.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phase0_prototype.errors import UserError
from phase4_scheduler.async_llm import AsyncLLM, EngineError, Supervision
from phase4_scheduler.server.options import ServerOptions

ROOM = "phase4_scheduler"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOCAL = ("127.0.0.1", "localhost", "::1")
_DESCRIPTORS = 65_536
_AFTER_ABORT = 10.0  # seconds in which aborted requests must have been told so
_log = logging.getLogger("titan.server")


@dataclass(frozen=True)
class ServeConfig:
    """A server from its command line.

    Attributes:
        model: directory, shipped name, hub id, or "null".
        host, port: where to listen; port 0 takes a free one.
        settings: of the engine.
        use: which implementation of the course's parts, as in "phase4=mine".
        options: of the API.
        supervision: how patient to be with the engine.
        shutdown_timeout: seconds that running requests may take after the first signal.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    settings: dict[str, Any] = field(default_factory=dict)
    use: str = ""
    options: ServerOptions = field(default_factory=ServerOptions)
    supervision: Supervision = field(default_factory=Supervision)
    shutdown_timeout: float = 30.0


def serve(config: ServeConfig) -> None:
    """Serve until a signal says to end.

    Raises:
        UserError: the port is taken, or the engine says what is wrong with model or settings.
    """
    for number in _SIGNALS:  # until the loop has its own: nothing runs yet that could be drained
        signal.signal(number, _leave)
    _take_descriptors()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with listen(config.host, config.port) as sock, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, sock))


async def _serve(config: ServeConfig, sock: socket.socket) -> None:
    llm = AsyncLLM(config.model, config.settings, use=config.use, supervision=config.supervision)
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    await llm.start()
    await asyncio.sleep(0)  # the child is on its way before this process is busy with imports
    try:
        front = await _front(config)
        stop = asyncio.Event()
        answering = asyncio.create_task(front.serve(llm, replace(config.options, use=config.use), sock, stop))
        try:
            await _until_signal(config, llm, sock, answering, signals)
            stop.set()
            await _drain(config, llm, answering, signals)
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
    finally:
        await llm.shutdown()


async def _front(config: ServeConfig) -> Any:
    """The part that talks HTTP, of the solution or the learner's. Its imports are slow."""
    from module0_profiling.course.parts import Use, resolve

    return resolve(ROOM, "server.front", Use.parse(config.use))


async def _until_signal(
    config: ServeConfig, llm: AsyncLLM, sock: socket.socket, answering: asyncio.Task[None], signals: asyncio.Queue[int]
) -> None:
    """Say when the engine is ready, and wait for the first signal."""
    signalled = asyncio.create_task(signals.get())
    loading = asyncio.create_task(llm.ready())
    try:
        waiting: set[asyncio.Task[Any]] = {signalled, loading, answering}
        while not signalled.done():
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering  # it never ends by itself: this raises what went wrong
                return
            if loading in waiting and loading.done():
                waiting.discard(loading)
                try:
                    described = (await loading).described
                    where = _url(sock)
                    parts = f" ({described})" if described else ""
                    print(f"{config.model} is ready at {where} after {_age():.1f} s{parts}", flush=True)
                except EngineError as error:
                    _log.error("%s", error)  # it is tried again; /health tells
    finally:
        signalled.cancel()
        loading.cancel()


async def _drain(
    config: ServeConfig, llm: AsyncLLM, answering: asyncio.Task[None], signals: asyncio.Queue[int]
) -> None:
    """Let what runs finish, at most `shutdown_timeout` seconds or until another signal comes."""
    if llm.in_flight:
        _log.info("draining: %d requests may run for %g s more", llm.in_flight, config.shutdown_timeout)
    again = asyncio.create_task(signals.get())
    await asyncio.wait((answering, again), timeout=config.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not answering.done():
        _log.warning("aborting %d requests", llm.in_flight)
        await llm.shutdown()
        await asyncio.wait((answering,), timeout=_AFTER_ABORT)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens: who comes before the application is there waits in its queue."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host {host!r} is not an address of this machine: {error.strerror}") from None
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # without the last, asyncio leaves Nagle on
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(4096)
    except OSError as error:
        sock.close()
        raise UserError(
            f"port {port} of {host} can't be listened at ({error.strerror}): choose another --port"
        ) from None
    sock.setblocking(False)
    return sock


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def warn_if_open(host: str, keys: tuple[str, ...]) -> str:
    """A warning for a server that strangers can use; "" if it is not one."""
    if host in _LOCAL or keys:
        return ""
    return f"warning: --host {host} lets everybody who reaches this machine use the model: set --api-key"


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # not on every platform, and not needed
        return None
    return uvloop.new_event_loop


def _take_descriptors() -> None:
    """Raise the limit as far as allowed: each connection takes one, and shells give 1,024."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    with suppress(OSError, ValueError):  # macOS has another limit behind this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(0)


def _age() -> float:
    """Seconds since this process was started."""
    if sys.platform == "linux":  # psutil adds the time of boot, which is known to a second only
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    import psutil

    return time.time() - psutil.Process().create_time()
