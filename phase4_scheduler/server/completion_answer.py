"""POST /v1/completions: the answer, whole or as a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from phase4_scheduler.server.completion_protocol import CompletionRequest, shows_prompt_only
from phase4_scheduler.server.errors import ApiError, body_of
from phase4_scheduler.server.job import Job
from phase4_scheduler.server.logprob_json import completion_logprobs, prompt_logprobs
from phase4_scheduler.server.prompts import TextEncoder

if TYPE_CHECKING:
    from phase4_scheduler.output_stream import Piece

DONE = b"data: [DONE]\n\n"
_json = msgspec.json.encode


def usage_of(job: Job, shown: bool = True) -> dict[str, int]:
    """Tokens of the prompts and of the answers so far."""
    made = job.completion_tokens if shown else 0
    return {
        "prompt_tokens": job.prompt_tokens,
        "total_tokens": job.prompt_tokens + made,
        "completion_tokens": made,
    }


def failed(error: ApiError) -> bytes:
    """The end of a stream that an error ends."""
    return b"data: " + _json(body_of(error)) + b"\n\n" + DONE


class CompletionAnswer:
    """Args:
    request: asked for it.
    job: runs.
    texts: of the prompts, for `echo`.
    encoder: the tokenizer; None for a model without one.
    answer_id, created, model: of the answer's envelope.
    """

    def __init__(
        self,
        request: CompletionRequest,
        job: Job,
        texts: Sequence[str],
        encoder: TextEncoder | None,
        *,
        answer_id: str,
        created: int,
        model: str,
    ) -> None:
        self._request, self._job, self._texts, self._encoder = request, job, texts, encoder
        self._envelope = {"id": answer_id, "object": "text_completion", "created": created, "model": model}
        self._n = job.params.n
        self._hidden = shows_prompt_only(request)
        self._offsets: dict[int, int] = {}  # by choice: characters whose logprobs were told

    async def whole(self) -> dict[str, Any]:
        """Everything, when all has ended.

        Raises:
            ApiError: 500 or 503.
        """
        parts: dict[int, list[Piece]] = {i: [] for i in range(self._n * len(self._job.streams))}
        async for prompt, pieces in self._job.pieces():
            for piece in pieces:
                parts[prompt * self._n + piece.index].append(piece)
        choices = [self._choice(place, found) for place, found in parts.items()]
        return {**self._envelope, "choices": choices, "usage": usage_of(self._job, not self._hidden)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events, those of a step in one.

        Raises:
            ApiError: 500 or 503; what came before it is told.
        """
        request, n = self._request, self._n
        head = b"data: " + _json(self._envelope)[:-1] + b',"choices":[{"index":'
        told = request.continuous_usage
        tail = b'}],"usage":null}\n\n' if request.include_usage else b"}]}\n\n"
        rich = bool(request.echo or request.return_token_ids or request.logprobs is not None or told)
        ends = b',"logprobs":null,"finish_reason":null' + tail
        async for prompt, pieces in self._job.pieces():
            out = []
            for piece in pieces:
                place = prompt * n + piece.index
                if rich or piece.finish_reason is not None:
                    event = {**self._envelope, "choices": [self._choice(place, [piece])]}
                    if request.include_usage:
                        event["usage"] = usage_of(self._job, not self._hidden) if told else None
                    out.append(b"data: " + _json(event) + b"\n\n")
                else:  # the same event, without building it: this runs for every token
                    out.append(b'%b%d,"text":%b%b' % (head, place, _json(piece.text), ends))
            yield b"".join(out)
        last = b""
        if request.include_usage:
            last = b"data: " + _json({**self._envelope, "choices": [], "usage": usage_of(self._job, not self._hidden)})
            last += b"\n\n"
        yield last + DONE

    def _choice(self, place: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """One choice, or what these pieces add to it."""
        request, job = self._request, self._job
        stream = job.streams[place // self._n]
        is_first = place not in self._offsets
        offset = self._offsets.setdefault(place, 0)
        echoed = is_first and bool(request.echo)
        last = pieces[-1]
        shown = [] if self._hidden else pieces
        choice: dict[str, Any] = {
            "index": place,
            "text": (self._texts[place // self._n] if echoed else "") + "".join(p.text for p in shown),
            "logprobs": None,
            "finish_reason": "length" if self._hidden and last.finish_reason else last.finish_reason,
            "stop_reason": None if self._hidden else last.stop_reason,
        }
        if request.logprobs is not None:
            known = stream.prompt_logprobs or []
            before = list(zip(stream.prompt_token_ids, known, strict=True)) if echoed else []
            after = [pair for p in shown for pair in zip(p.token_ids, p.logprobs or [], strict=True)]
            choice["logprobs"], self._offsets[place] = completion_logprobs([*before, *after], offset, self._text_of)
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(stream.prompt_logprobs or [])
        if request.return_token_ids:
            choice["token_ids"] = [i for p in shown for i in p.token_ids]
            if is_first:
                choice["prompt_token_ids"] = stream.prompt_token_ids
        return choice

    def _text_of(self, token_id: int) -> str:
        return self._encoder.text(token_id) if self._encoder else ""
