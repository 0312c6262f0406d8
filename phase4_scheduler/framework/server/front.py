"""A front with one counter: a request is read, computed to its last token, and answered; then comes the next.

POST /v1/completions, GET /health and /ready, over HTTP/1.1 with a connection for each request.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from phase0_prototype.errors import UserError
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.server import body as request_body
from phase4_scheduler.server import neutral
from phase4_scheduler.server.completion_protocol import CompletionRequest, completion_params, prompts_of
from phase4_scheduler.server.errors import ApiError, bad, body_of
from phase4_scheduler.server.options import ServerOptions

if TYPE_CHECKING:
    from phase0_prototype.outputs import RequestOutput
    from phase4_scheduler.async_llm import AsyncLLM


async def serve(llm: AsyncLLM, options: ServerOptions, sock: socket.socket, stop: asyncio.Event) -> None:
    """Answer HTTP until `stop` is set and what runs has been answered.

    Args:
        llm: the engine's client, which was started.
        options: limits and keys.
        sock: bound; listens here at the latest.
        stop: says when to end.
    """
    # TASK 4.5: a server for many at once: answers that stream (server-sent events), requests that are in the engine
    # together, and one that is cancelled as soon as its client has gone. `server/` has everything that such a server
    # needs beside this file: protocols, limits, admission, metrics, pages. Take a web server that others have written.
    counter = asyncio.Lock()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await _answer(llm, options, reader, counter))
            with suppress(ConnectionError):  # the client did not wait
                await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(one, sock=sock, limit=options.max_header_bytes)
    try:
        await stop.wait()
    finally:
        server.close()
    async with counter:  # whoever is being served has the answer then
        return


async def _answer(llm: AsyncLLM, options: ServerOptions, reader: asyncio.StreamReader, counter: asyncio.Lock) -> bytes:
    try:
        async with asyncio.timeout(options.body_timeout):
            method, path, headers = await _head(reader)
            if path in ("/health", "/ready"):
                return _response(200 if path == "/health" or llm.state == "ready" else 503, b"")
            _check_key(headers, options.api_keys)
            if (method, path) != ("POST", "/v1/completions"):
                raise ApiError(404, f"{method} {path:.100} is not served: POST /v1/completions is")
            content = await _body(reader, headers, options.max_body_bytes)
        request = request_body.decode(content, CompletionRequest, neutral.COMPLETION)
        if request.echo or request.logprobs is not None:
            raise bad("echo and logprobs are not served: leave them out", "echo" if request.echo else "logprobs")
        async with counter:  # nobody else is served until this one's last token
            return await _complete(llm, options, request)
    except (ApiError, UserError, EngineError, TimeoutError, EOFError, asyncio.LimitOverrunError) as error:
        return _refused(_explained(error, options))


def _explained(error: Exception, options: ServerOptions) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(503, f"{error}: try again", retry_after=error.retry_after)
    if isinstance(error, TimeoutError):
        return ApiError(408, f"the request had not arrived after {options.body_timeout:g} s: send it faster")
    if isinstance(error, asyncio.LimitOverrunError):
        return ApiError(431, "the headers are too long: send less")
    return bad("the request is not complete: send all of it" if isinstance(error, EOFError) else str(error))


async def _head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]]:
    """Method, path and headers, whose names are in small letters."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    method, path, *_ = f"{lines[0]}  ".split(" ")
    named = (line.partition(":") for line in lines[1:] if line)
    return method, path.partition("?")[0], {name.strip().lower(): value.strip() for name, _, value in named}


def _check_key(headers: dict[str, str], keys: Sequence[str]) -> None:
    given = headers.get("authorization", "").removeprefix("Bearer ").encode()
    if keys and not any([hmac.compare_digest(given, key.encode()) for key in keys]):
        raise ApiError(401, "the key is missing or wrong: send Authorization: Bearer ...")


async def _body(reader: asyncio.StreamReader, headers: dict[str, str], most: int) -> bytes:
    size = headers.get("content-length", "")
    if not size.isdigit():
        raise bad("the request has no Content-Length: send one")
    if int(size) > most:
        raise ApiError(413, f"the body has {size} bytes, {most} are allowed: send less")
    return await reader.readexactly(int(size))


async def _complete(llm: AsyncLLM, options: ServerOptions, request: CompletionRequest) -> bytes:
    params = completion_params(request, options, await llm.ready())
    outputs = [
        await llm.generate(prompt, params, priority=request.priority or 0, timeout=request.timeout)
        for prompt in prompts_of(request, options.max_prompts)
    ]
    answer = _json_of(outputs, request.model or llm.model)
    if request.stream:  # in one piece, when there is nothing left to stream
        events = b"data: " + msgspec.json.encode(answer) + b"\n\ndata: [DONE]\n\n"
        return _response(200, events, kind="text/event-stream")
    return _response(200, msgspec.json.encode(answer))


def _json_of(outputs: Sequence[RequestOutput], model: str) -> dict[str, Any]:
    answers = [completion for output in outputs for completion in output.outputs]
    prompt, made = sum(len(o.prompt_token_ids) for o in outputs), sum(len(a.token_ids) for a in answers)
    return {
        "id": f"cmpl-{time.time_ns()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": place, "text": answer.text, "logprobs": None, "finish_reason": answer.finish_reason}
            for place, answer in enumerate(answers)
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made},
    }


def _refused(error: ApiError) -> bytes:
    wait = "" if error.retry_after is None else f"Retry-After: {max(1, round(error.retry_after))}\r\n"
    return _response(error.status, msgspec.json.encode(body_of(error)), wait)


def _response(status: int, content: bytes, headers: str = "", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content
