"""POST /v1/messages: Anthropic's answer, whole or as its named events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from phase4_scheduler.server.errors import ApiError, body_of
from phase4_scheduler.server.job import Job

if TYPE_CHECKING:
    from phase4_scheduler.output_stream import Piece

_json = msgspec.json.encode


def event(kind: str, **content: Any) -> bytes:
    """One event; its name stands in the data too."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json({"type": kind, **content}))


def failed(error: ApiError) -> bytes:
    """The end of a stream that an error ends."""
    return b"event: error\ndata: %b\n\n" % _json(body_of(error, anthropic=True))


class MessagesAnswer:
    """Args:
    job: runs.
    answer_id, model: of the answer's envelope.
    """

    def __init__(self, job: Job, *, answer_id: str, model: str) -> None:
        self._job = job
        self._envelope = {"id": answer_id, "type": "message", "role": "assistant", "model": model}

    async def whole(self) -> dict[str, Any]:
        """Everything, when it has ended.

        Raises:
            ApiError: 500 or 503.
        """
        found: list[Piece] = []
        async for _, pieces in self._job.pieces():
            found += pieces
        text = "".join(p.text for p in found)
        content = [{"type": "text", "text": text, "citations": None}]
        return {**self._envelope, "content": content, **_stop(found[-1]), "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events, those of a step in one.

        Raises:
            ApiError: 500 or 503; what came before it is told.
        """
        begun = False
        async for _, pieces in self._job.pieces():
            out = []
            if not begun:
                begun = True
                started: dict[str, Any] = {**self._envelope, "content": [], "stop_reason": None, "stop_sequence": None}
                out.append(event("message_start", message={**started, "usage": self._usage()}))
                out.append(event("content_block_start", index=0, content_block={"type": "text", "text": ""}))
                out.append(event("ping"))
            for piece in pieces:
                if piece.text:
                    out.append(
                        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
                        b'"delta":{"type":"text_delta","text":%b}}\n\n' % _json(piece.text)
                    )
            if pieces[-1].finish_reason is not None:
                out.append(event("content_block_stop", index=0))
                out.append(event("message_delta", delta=_stop(pieces[-1]), usage=self._usage()))
                out.append(event("message_stop"))
            if out:
                yield b"".join(out)

    def _usage(self) -> dict[str, int]:
        return {"input_tokens": self._job.prompt_tokens, "output_tokens": self._job.completion_tokens}


def _stop(last: Piece) -> dict[str, str | None]:
    if last.finish_reason == "stop" and isinstance(last.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
    return {"stop_reason": "end_turn" if last.finish_reason == "stop" else "max_tokens", "stop_sequence": None}
