"""A server that is not ours: what the load generator's client is tested against.

It is an ASGI application behind uvicorn, so the HTTP framing comes from another implementation. The request says how it
shall behave, in fields that a real server would not know: `"peer": {"chunks": 5, "pause": 0.01, "fault": "cut"}`.

    python -m phase4_scheduler.tests.sse_peer PORT_FILE     runs it in a process of its own
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn

MODEL = "peer-model"


class Peer:
    """The application; `seen` are the bodies of all requests, `refusals_left` of the next are answered 429."""

    def __init__(self, key: str = "", refusals: int = 0, retry_after: str = "0.05") -> None:
        self.key, self.refusals_left, self.retry_after = key, refusals, retry_after
        self.seen: list[dict] = []
        self.open = self.most_open = self.disconnected = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            await self._json(send, 401, {"error": {"message": "no valid key", "type": "auth", "code": 401}})
        elif scope["path"] == "/v1/models":
            await self._json(send, 200, {"object": "list", "data": [{"id": MODEL}, {"id": "another"}]})
        elif scope["path"] == "/version":
            await self._json(send, 200, {"version": "1.2.3"})
        elif scope["path"] in ("/v1/completions", "/v1/chat/completions"):
            self.open += 1
            self.most_open = max(self.open, self.most_open)
            try:
                await self._complete(scope["path"], json.loads(await _body(receive)), receive, send)
            finally:
                self.open -= 1
        else:
            await self._json(send, 404, {"detail": "Not Found"})

    async def _json(self, send, status: int, body: dict, headers: tuple = ()) -> None:
        data = json.dumps(body).encode()
        lines = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *headers]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": data})

    async def _complete(self, path: str, asked: dict, receive, send) -> None:
        self.seen.append(asked)
        told = {"chunks": asked["max_tokens"], "pause": 0.0, "fault": "", "merge": 1, **asked.get("peer", {})}
        if self.refusals_left:
            self.refusals_left -= 1
            error = {"error": {"message": "too many requests", "type": "overloaded", "param": None, "code": 429}}
            await self._json(send, 429, error, ((b"retry-after", self.retry_after.encode()),))
        elif told["fault"] == "400":
            await self._json(send, 400, {"error": {"message": "max_tokens is too large", "code": 400}})
        elif told["fault"] == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnected += 1
        else:
            kind = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            async for piece in _events(path.endswith("chat/completions"), asked, told):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _events(chat: bool, asked: dict, told: dict) -> AsyncIterator[bytes]:
    """The stream of an answer, with the fault that was asked for at its third chunk."""
    if chat:
        yield _chunk(chat, "", role=True)
    for i in range(told["chunks"]):
        if told["pause"]:
            await asyncio.sleep(told["pause"])
        if told["fault"] == "comment":
            yield b": keep-alive\n\n"
        if told["fault"] == "cut" and i == 2:
            raise ConnectionAbortedError  # uvicorn closes the connection amid the chunked body
        if told["fault"] == "error" and i == 2:
            yield _event({"error": {"message": "the engine died", "type": "server_error", "code": 500}})
            yield b"data: [DONE]\n\n"
            return
        last = i == told["chunks"] - 1 and not chat
        yield _chunk(chat, f" wörd{i}", "length" if last else None)
    if chat:
        yield _chunk(chat, None, "length")
    if (asked.get("stream_options") or {}).get("include_usage"):
        prompt = asked.get("prompt") or asked["messages"][0]["content"].split()
        counts = {"prompt_tokens": len(prompt), "completion_tokens": told["chunks"] * told["merge"]}
        yield _event({"id": "x", "choices": [], "usage": counts | {"total_tokens": sum(counts.values())}})
    if told["fault"] != "no done":
        yield b"data: [DONE]\n\n"


def _chunk(chat: bool, text: str | None, reason: str | None = None, *, role: bool = False) -> bytes:
    delta = {"role": "assistant"} if role else {}
    said = {"delta": delta | ({} if text is None else {"content": text})} if chat else {"text": text}
    return _event(
        {"id": "x", "model": MODEL, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}
    )


def _event(data: dict) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def _body(receive) -> bytes:
    data = b""
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body"):
            return data


def _server(peer: Peer, **tls: str) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(peer, log_level="critical", lifespan="off", timeout_graceful_shutdown=1, **tls)
    )


def _listening() -> socket.socket:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(512)
    return listening


@contextlib.contextmanager
def serving(peer: Peer, **tls: str) -> Iterator[str]:
    """Run it in a thread of this process; yields its base URL. `tls` are uvicorn's: ssl_keyfile, ssl_certfile."""
    listening, server = _listening(), _server(peer, **tls)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"{'https://localhost' if tls else 'http://127.0.0.1'}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


if __name__ == "__main__":
    bound = _listening()
    file = Path(sys.argv[1])
    file.with_suffix(".new").write_text(str(bound.getsockname()[1]))
    os.replace(file.with_suffix(".new"), file)
    _server(Peer()).run([bound])
