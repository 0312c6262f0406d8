"""The front: uvicorn with our application, for many clients at once. Ends when it is told to and all is answered."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from phase4_scheduler.server.app import make_app
from phase4_scheduler.server.options import ServerOptions
from phase4_scheduler.server.service import Service

if TYPE_CHECKING:
    from phase4_scheduler.async_llm import AsyncLLM

_IDLE = 75  # seconds that a connection may be kept for the next request
_LAST_BYTES = 5  # seconds in which clients must have taken the last answers


class _Server(uvicorn.Server):
    """Signals are the caller's: uvicorn would end at once, without a drain."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave them as they are."""
        yield


async def serve(llm: AsyncLLM, options: ServerOptions, sock: socket.socket, stop: asyncio.Event) -> None:
    """Answer HTTP until `stop` is set and what runs has been answered; new requests are 503 meanwhile.

    Args:
        llm: the engine's client, which was started.
        options: limits and keys.
        sock: bound; listens here at the latest.
        stop: says when to end.
    """
    app = make_app(llm, options)
    service: Service = app.state.service
    server = _Server(_config(app, options))
    gc.collect()
    gc.freeze()  # modules and routes live as long as the process: looking through them again only costs pauses
    running = asyncio.create_task(server.serve([sock]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        service.draining = True
        while service.ledger.open_prompts and not running.done():
            await asyncio.sleep(0.02)
    finally:
        stopping.cancel()
        server.should_exit = True
        await running


def _config(app: object, options: ServerOptions) -> uvicorn.Config:
    http: object = "h11"
    if importlib.util.find_spec("httptools"):
        from phase4_scheduler.server.http_protocol import limited_protocol

        http = limited_protocol(options)
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # an ASGI application
        http=http,  # type: ignore[arg-type]  # a name or a class
        h11_max_incomplete_event_size=options.max_header_bytes,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_LAST_BYTES,
        backlog=4096,
    )
