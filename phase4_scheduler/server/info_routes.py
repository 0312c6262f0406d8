"""The routes that tell: models, tokens, health, readiness, version, metrics, load, and the chat page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from module0_profiling import __version__
from phase4_scheduler.server import body
from phase4_scheduler.server.completion_protocol import DetokenizeRequest, TokenizeRequest
from phase4_scheduler.server.errors import ApiError, bad, json_response
from phase4_scheduler.server.service import Service

_PAGE = Path(__file__).with_name("page.html")
# The page's script and style are in it; nothing else may be loaded, and it may talk to this server only.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class InfoRoutes:
    """Args:
    service: what they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        """The names that `model` may have."""
        return json_response({"object": "list", "data": [self._model(name) for name in self._service.names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["model_id"]
        self._service.check_model(name)
        return json_response(self._model(name))

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a chat."""
        service = self._service
        asked = await self._read(request, TokenizeRequest)
        service.check_model(asked.model)
        info = service.info()
        if (asked.prompt is None) == (asked.messages is None):
            raise bad("give either prompt or messages", "prompt")
        if asked.prompt is not None:
            ids = await service.encode([asked.prompt], info, -1, asked.add_special_tokens is not False)
        else:
            ids = await service.encode_chat(asked, info)
        strings = [service.encoder.text(i) for i in ids] if asked.return_token_strs else None
        return json_response(
            {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": strings}
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        service = self._service
        asked = await self._read(request, DetokenizeRequest)
        service.check_model(asked.model)
        size = service.info().vocab_size
        unknown = next((i for i in asked.tokens if not 0 <= i < size), None)
        if unknown is not None:
            raise bad(f"token id {unknown:.3g} is not of the vocabulary 0..{size - 1}", "tokens")
        return json_response({"prompt": service.encoder.decode(asked.tokens, skip_special_tokens=False)})

    async def health(self, request: Request) -> Response:
        """Whether it makes sense to let this server live: 503 when its engine hangs or dies again and again."""
        state = self._service.llm.state
        return json_response({"status": state}, 503 if state in ("hung", "broken") else 200)

    async def ready(self, request: Request) -> Response:
        """Whether requests are taken now."""
        state = self._service.state
        if state == "ready":
            return json_response({"status": state})
        return json_response({"status": state}, 503, {"Retry-After": "1"})

    async def version(self, request: Request) -> Response:
        """Of this program."""
        return json_response({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        service = self._service
        text = service.metrics.render(
            service.stats,
            service.meter.summary(),
            in_flight=service.ledger.open_prompts,
            backlog=service.ledger.backlog_tokens,
            restarts=service.llm.restarts,
            state=service.state,
        )
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def load(self, request: Request) -> Response:
        """For `titan top`."""
        return json_response(self._service.report())

    async def page(self, request: Request) -> Response:
        """A chat in the browser."""
        headers = {
            "content-security-policy": _POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }
        return Response(_PAGE.read_bytes(), headers=headers, media_type="text/html; charset=utf-8")

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        options = self._service.options
        given = await body.read(request, options.max_body_bytes, options.body_timeout)
        return body.decode(given, kind, {})

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        info = service.llm.info
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "titaninfer",
            "root": service.llm.model,
            "max_model_len": info.max_model_len if info else None,
        }


def not_found(path: str) -> ApiError:
    """The answer to a path that is no route."""
    return ApiError(404, f"{path:.100} is not a route of this server: see /openapi.json", code="not_found")
