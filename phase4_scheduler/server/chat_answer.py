"""POST /v1/chat/completions: the answer, whole or as a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from phase4_scheduler.server.chat_protocol import ChatRequest
from phase4_scheduler.server.completion_answer import DONE, usage_of
from phase4_scheduler.server.job import Job
from phase4_scheduler.server.logprob_json import chat_logprobs, prompt_logprobs

if TYPE_CHECKING:
    from phase4_scheduler.output_stream import Piece

_json = msgspec.json.encode


class ChatAnswer:
    """Args:
    request: asked for it.
    job: runs.
    answer_id, created, model: of the answer's envelope.
    """

    def __init__(self, request: ChatRequest, job: Job, *, answer_id: str, created: int, model: str) -> None:
        self._request, self._job = request, job
        self._id, self._created, self._model = answer_id, created, model

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    async def whole(self) -> dict[str, Any]:
        """Everything, when all has ended.

        Raises:
            ApiError: 500 or 503.
        """
        parts: dict[int, list[Piece]] = {i: [] for i in range(self._job.params.n)}
        async for _, pieces in self._job.pieces():
            for piece in pieces:
                parts[piece.index].append(piece)
        choices = []
        for index, found in parts.items():
            message = {"role": "assistant", "content": "".join(p.text for p in found), "refusal": None}
            choices.append({"index": index, "message": message, **self._rest(found)})
        answer = {**self._envelope("chat.completion"), "choices": choices, "usage": usage_of(self._job)}
        stream = self._job.streams[0]
        if self._request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(stream.prompt_logprobs or [])
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = stream.prompt_token_ids
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events, those of a step in one; each choice begins with its role.

        Raises:
            ApiError: 500 or 503; what came before it is told.
        """
        request = self._request
        envelope = self._envelope("chat.completion.chunk")
        head = b"data: " + _json(envelope)[:-1] + b',"choices":[{"index":'
        tail = b'}],"usage":null}\n\n' if request.include_usage else b"}]}\n\n"
        ends = b'},"logprobs":null,"finish_reason":null' + tail
        told = request.continuous_usage
        rich = bool(request.return_token_ids or request.logprobs or told)
        begun: set[int] = set()
        async for _, pieces in self._job.pieces():
            out = []
            for piece in pieces:
                if piece.index not in begun:
                    begun.add(piece.index)
                    out.append(b'%b%d,"delta":{"role":"assistant","content":""%b' % (head, piece.index, ends))
                if rich or piece.finish_reason is not None:
                    choice = {"index": piece.index, "delta": {"content": piece.text}, **self._rest([piece])}
                    event = {**envelope, "choices": [choice]}
                    if request.include_usage:
                        event["usage"] = usage_of(self._job) if told else None
                    out.append(b"data: " + _json(event) + b"\n\n")
                else:  # the same event, without building it: this runs for every token
                    out.append(b'%b%d,"delta":{"content":%b%b' % (head, piece.index, _json(piece.text), ends))
            yield b"".join(out)
        last = b""
        if request.include_usage:
            last = b"data: " + _json({**envelope, "choices": [], "usage": usage_of(self._job)}) + b"\n\n"
        yield last + DONE

    def _rest(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What a choice has beside its text."""
        request, last = self._request, pieces[-1]
        ids = [i for p in pieces for i in p.token_ids]
        positions = [one for p in pieces for one in p.logprobs or []]
        rest: dict[str, Any] = {
            "logprobs": chat_logprobs(ids, positions, request.top_logprobs or 0) if request.logprobs else None,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        return rest | ({"token_ids": ids} if request.return_token_ids else {})
