"""Reading a request's body: bounded in bytes and in time, decoded strictly, refused so that the client sees why."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phase4_scheduler.server import neutral
from phase4_scheduler.server.errors import ApiError, bad

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 256 << 20
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_T = TypeVar("_T")


async def read(request: Request, max_bytes: int, timeout: float) -> bytes:
    """The body.

    Raises:
        ApiError: 408, 413 or 415.
        ClientDisconnect: the client is gone.
    """
    headers = request.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type {kind[:60]!r} is not accepted: send application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, f"Content-Encoding {headers['content-encoding'][:60]!r} is not accepted: send it plain")
    said = headers.get("content-length", "")
    if said.isdigit() and int(said) > max_bytes:
        raise _too_large(max_bytes)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(
            408, f"the body had not arrived after {timeout:g} s: send it faster", headers=(("Connection", "close"),)
        ) from None


def decode(body: bytes, kind: type[_T], allowed: Mapping[str, Any]) -> _T:
    """The request in a body.

    Args:
        body: JSON.
        kind: a Struct that forbids unknown fields.
        allowed: fields beside those of `kind`, with the values that ask for nothing.

    Raises:
        ApiError: 400 that names the field.
    """
    try:
        given = msgspec.json.decode(body)
    except RecursionError:
        raise bad("the body is nested too deeply: send a flat JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise bad(f"the body is not a JSON object but {type(given).__name__}: send an object")
    try:
        return msgspec.convert(neutral.strip(given, allowed), kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind, allowed) from None
    except RecursionError:
        raise bad("the body is nested too deeply: send a flat JSON object") from None


def _explained(message: str, kind: type, allowed: Mapping[str, Any]) -> ApiError:
    place = _PLACE.search(message)
    found = _UNKNOWN.search(message)
    if found and not place:
        return neutral.unknown(found[1], [*(f.name for f in msgspec.structs.fields(kind)), *allowed])
    if missing := re.search(r"missing required field `(.*?)`", message):
        name = f"{place[1]}.{missing[1]}" if place else missing[1]
        return bad(f"{name} is missing: give it", name)
    if place:
        told = message[: place.start()].replace("`", "")
        return bad(f"{place[1]}: {told[0].lower()}{told[1:]}", place[1])
    return bad(message)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {max_bytes} bytes: send less, or start the server with a larger --max-body-bytes",
        headers=(("Connection", "close"),),
    )


class Refusal(Response):
    """An error that is sent while the client may still be sending its body.

    A connection that is closed with unread bytes is reset, and the client may then never see the answer. So what comes
    is thrown away for a while before the answer ends.
    """

    def __init__(self, response: Response) -> None:
        super().__init__()
        self._response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self._response.status_code,
                "headers": self._response.raw_headers,
            }
        )
        await send({"type": "http.response.body", "body": self._response.body, "more_body": True})
        thrown = 0
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while thrown < _LINGER_BYTES:
                    message = await receive()
                    thrown += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
