"""The application: routes, errors, and what runs beside the requests."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from module0_profiling import __version__
from phase0_prototype.errors import UserError
from phase0_prototype.hub import resolve_model
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.server import schema
from phase4_scheduler.server.body import Refusal
from phase4_scheduler.server.chat_protocol import ChatRequest
from phase4_scheduler.server.chat_template import load_chat_template
from phase4_scheduler.server.completion_protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest
from phase4_scheduler.server.errors import ApiError, response_of
from phase4_scheduler.server.generate_routes import GenerateRoutes
from phase4_scheduler.server.guard import Guard
from phase4_scheduler.server.info_routes import InfoRoutes, not_found
from phase4_scheduler.server.log_line import last_line, log_line
from phase4_scheduler.server.messages_protocol import CountRequest, MessagesRequest
from phase4_scheduler.server.options import ServerOptions
from phase4_scheduler.server.service import Service

if TYPE_CHECKING:
    from phase4_scheduler.async_llm import AsyncLLM

_log = logging.getLogger("titan.server")
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(llm: AsyncLLM, options: ServerOptions | None = None) -> FastAPI:
    """The server's application. Its `state.service` is the `Service` behind the routes.

    Args:
        llm: started by the caller, who also shuts it down.
        options: limits, keys and names.
    """
    options = options or ServerOptions()
    service = Service(llm, options, Path(llm.model).name)
    app = FastAPI(title="TitanInfer", version=__version__, docs_url=None, redoc_url=None, lifespan=_beside(service))
    app.state.service = service
    _add_routes(app, service)
    for kind in (ApiError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(Guard, api_keys=options.api_keys)
    _describe(app)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    makes, tells = GenerateRoutes(service), InfoRoutes(service)

    def post(path: str, endpoint: Endpoint, kind: type, errors: tuple[int, ...], *, anthropic: bool = False) -> None:
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            openapi_extra=schema.request_body(kind),
            responses=schema.responses(*errors, anthropic=anthropic),
        )

    def get(path: str, endpoint: Endpoint, *errors: int) -> None:
        app.add_api_route(
            path,
            endpoint,
            methods=["GET"],
            response_model=None,
            responses=schema.responses(*errors) if errors else None,
        )

    post("/v1/completions", makes.completions, CompletionRequest, schema.GENERATES)
    post("/v1/chat/completions", makes.chat, ChatRequest, schema.GENERATES)
    post("/v1/messages", makes.messages, MessagesRequest, schema.GENERATES, anthropic=True)
    post("/v1/messages/count_tokens", makes.count_tokens, CountRequest, schema.BODY, anthropic=True)
    post("/tokenize", tells.tokenize, TokenizeRequest, schema.BODY)
    post("/detokenize", tells.detokenize, DetokenizeRequest, schema.BODY)
    get("/v1/models", tells.models, 401)
    get("/v1/models/{model_id:path}", tells.model, 401, 404)
    get("/health", tells.health, 503)
    get("/ready", tells.ready, 503)
    get("/version", tells.version, 401)
    get("/metrics", tells.metrics, 401)
    get("/load", tells.load, 401)
    get("/", tells.page)


async def _answer_error(request: Request, error: Exception) -> Response:
    path = request.url.path
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, HTTPException):
        headers = tuple((error.headers or {}).items())
        told = f"{request.method} is not allowed on {path:.100}: use {dict(headers).get('Allow', 'another method')}"
        error = not_found(path) if error.status_code == 404 else ApiError(error.status_code, told, headers=headers)
    if not isinstance(error, ApiError):  # a mistake of ours; its traceback is in the log
        error = ApiError(500, "the server failed to answer: its log says why", code="internal_error")
    response = response_of(error, path)
    return Refusal(response) if ("Connection", "close") in error.headers else response


def _describe(app: FastAPI) -> None:
    """Complete FastAPI's document with the requests' schemas."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        document.setdefault("components", {})["schemas"] = schema.components()
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI's documentation shows


def _beside(service: Service) -> Callable[[FastAPI], Any]:
    """Tasks that run as long as the application: reading the template, sampling the counters, the log line."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_load_template(service)), asyncio.create_task(_sample(service))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if service.options.log_interval and service.ledger.accepted:
            _log.info(last_line(service))

    return lifespan


async def _load_template(service: Service) -> None:
    """When the engine is ready, the checkpoint is on this machine. Errors of the engine are the caller's business."""
    llm = service.llm
    with suppress(UserError, EngineError):
        await llm.ready()
        model = "titan-tiny" if llm.model == "null" else llm.model
        try:
            directory = await asyncio.to_thread(resolve_model, model)
            service.template = load_chat_template(directory, service.options.chat_template)
        except UserError as error:
            _log.warning("there is no chat: %s", error)


async def _sample(service: Service) -> None:
    """Once a second; a line in the log every few."""
    seconds = tidied = 0
    while True:
        await asyncio.sleep(1.0)
        service.sample()
        seconds += 1
        if service.ledger.ended != tidied and not service.ledger.open_prompts:
            tidied = service.ledger.ended
            gc.collect()  # returns what Python keeps for later; cheap, as what lasts is frozen (front.py)
        interval = service.options.log_interval
        if interval and seconds % max(1, round(interval)) == 0:
            line = log_line(service)
            if line:
                _log.info(line)
