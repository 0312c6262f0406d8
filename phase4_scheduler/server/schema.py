"""The OpenAPI document. The request types are msgspec's, so their schemas are put in by hand; answers are described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from phase4_scheduler.server import neutral
from phase4_scheduler.server.chat_protocol import ChatRequest
from phase4_scheduler.server.completion_protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest
from phase4_scheduler.server.messages_protocol import CountRequest, MessagesRequest

_REF = "#/components/schemas/{name}"
_KINDS: Mapping[type, Mapping[str, Any]] = {
    CompletionRequest: neutral.COMPLETION,
    ChatRequest: neutral.CHAT,
    MessagesRequest: neutral.MESSAGES,
    CountRequest: neutral.MESSAGES,
    TokenizeRequest: {},
    DetokenizeRequest: {},
}
_TOLD = {
    400: "the request is wrong: the message names the field",
    401: "no API key, or a wrong one",
    404: "no such model",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "the body is not plain JSON",
    429: "the queue is full: Retry-After says when to try again",
    500: "generation failed",
    503: "no engine takes requests now: Retry-After says when to try again",
}
BODY = (400, 401, 404, 408, 413, 415, 503)
GENERATES = (*BODY, 429, 500)


def request_body(kind: type) -> dict[str, Any]:
    """What `openapi_extra` takes for a route with this request."""
    reference = {"$ref": _REF.format(name=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def responses(*statuses: int, anthropic: bool = False) -> dict[int | str, dict[str, Any]]:
    """The errors of a route."""
    reference = {"$ref": _REF.format(name="AnthropicError" if anthropic else "Error")}
    return {s: {"description": _TOLD[s], "content": {"application/json": {"schema": reference}}} for s in statuses}


def components() -> dict[str, Any]:
    """Schemas of all requests and of errors, by name."""
    _, found = msgspec.json.schema_components(list(_KINDS), ref_template=_REF)
    for kind, allowed in _KINDS.items():
        found[kind.__name__]["properties"] |= neutral.schema(allowed)
    text = {"type": ["string", "null"]}
    inner = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    found["Error"] = _object({"error": _object(inner)})
    found["AnthropicError"] = _object(
        {
            "type": {"const": "error"},
            "error": _object({"type": {"type": "string"}, "message": {"type": "string"}}),
        }
    )
    return found


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
