"""API keys: a pure ASGI middleware in front of every route. (Starlette's BaseHTTPMiddleware would copy each chunk.)"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from phase4_scheduler.server.errors import ApiError, response_of

OPEN = frozenset({"/health", "/ready", "/"})  # for load balancers, and the page that asks for the key


class Guard:
    """Lets requests with a key pass. Unknown paths need one too: a stranger learns nothing of the routes.

    Args:
        app: behind it.
        api_keys: any of them opens; none: there is no lock.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN or self._knows(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed: send it as Authorization: Bearer KEY or as x-api-key: KEY",
            code="invalid_api_key",
            headers=(("WWW-Authenticate", "Bearer"),),
        )
        await response_of(error, scope["path"])(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        """Takes as long for a wrong key as for a right one: digests have one length, and all are compared."""
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
            elif name == b"x-api-key" and not given:
                given = value.strip()
        digest = hashlib.sha256(given).digest()
        return any([hmac.compare_digest(digest, known) for known in self._digests])
