"""Errors as clients expect them: OpenAI's `{"error": {...}}` everywhere, Anthropic's shape under /v1/messages.

OpenAI: https://platform.openai.com/docs/guides/error-codes, Anthropic: https://docs.anthropic.com/en/api/errors.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

_OPENAI = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}
_ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line for the user: what, which value, the remedy.
        param: the field that is wrong.
        code: a word for programs.
        retry_after: seconds after which another try makes sense.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.headers = retry_after, headers


def bad(message: str, param: str | None = None) -> ApiError:
    """A request that the client must change."""
    return ApiError(400, message, param=param)


def is_anthropic(path: str) -> bool:
    """Whether errors on this path have Anthropic's shape."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def body_of(error: ApiError, *, anthropic: bool = False) -> dict[str, Any]:
    """The JSON object that tells of an error."""
    if anthropic:
        kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    kind = _OPENAI.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON; Starlette's own class goes through the slower `json` module."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def response_of(error: ApiError, path: str) -> Response:
    """The HTTP answer for an error."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return json_response(body_of(error, anthropic=is_anthropic(path)), error.status, headers)
