"""The routes that generate: completions, chat and Anthropic's messages."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from phase4_scheduler.core.wire import Info
from phase4_scheduler.server import body, completion_answer, messages_answer, neutral
from phase4_scheduler.server.chat_answer import ChatAnswer
from phase4_scheduler.server.chat_protocol import ChatRequest, chat_params
from phase4_scheduler.server.completion_answer import CompletionAnswer
from phase4_scheduler.server.completion_protocol import CompletionRequest, completion_params, prompts_of
from phase4_scheduler.server.errors import ApiError, json_response
from phase4_scheduler.server.job import Job
from phase4_scheduler.server.messages_answer import MessagesAnswer
from phase4_scheduler.server.messages_protocol import CountRequest, MessagesRequest, chat_of, messages_params
from phase4_scheduler.server.prompts import truncated
from phase4_scheduler.server.service import Service
from phase4_scheduler.server.sse import EventStream, unless_gone


class GenerateRoutes:
    """Args:
    service: what they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: Request) -> Response:
        """Continue one or more prompts."""
        service = self._service
        asked = await self._read(request, CompletionRequest, neutral.COMPLETION)
        service.check_model(asked.model)
        prompts = prompts_of(asked, service.options.max_prompts)
        info = service.info()
        params = completion_params(asked, service.options, info)
        ids = [await self._ids(prompt, asked, info) for prompt in prompts]
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        job = service.open(ids, texts, params, priority=asked.priority or 0, timeout=asked.timeout)
        encoder = service.encoder if service.llm.tokenizer else None
        echoed = [
            text if text is not None else encoder.decode(one, params.skip_special_tokens) if encoder else ""
            for text, one in zip(texts, ids, strict=True)
        ]
        answer = CompletionAnswer(
            asked,
            job,
            echoed,
            encoder,
            answer_id=_id("cmpl-", asked.request_id),
            created=int(time.time()),
            model=service.names[0],
        )
        return await self._answer(request, asked.stream, job, answer, completion_answer.failed)

    async def chat(self, request: Request) -> Response:
        """The next message of a chat."""
        service = self._service
        asked = await self._read(request, ChatRequest, neutral.CHAT)
        service.check_model(asked.model)
        info = service.info()
        params = chat_params(asked, service.options, info)
        ids = await service.encode_chat(asked, info)
        job = service.open([ids], [None], params, priority=asked.priority or 0, timeout=asked.timeout)
        answer = ChatAnswer(
            asked,
            job,
            answer_id=_id("chatcmpl-", asked.request_id),
            created=int(time.time()),
            model=service.names[0],
        )
        return await self._answer(request, asked.stream, job, answer, completion_answer.failed)

    async def messages(self, request: Request) -> Response:
        """The next message of a chat, as Anthropic's clients ask for it."""
        service = self._service
        asked = await self._read(request, MessagesRequest, neutral.MESSAGES)
        service.check_model(asked.model)
        info = service.info()
        params = messages_params(asked, service.options, info)
        ids = await self._message_ids(asked, info)
        job = service.open([ids], [None], params)
        answer = MessagesAnswer(job, answer_id=_id("msg_"), model=service.names[0])
        return await self._answer(request, asked.stream, job, answer, messages_answer.failed)

    async def count_tokens(self, request: Request) -> Response:
        """Tokens that `messages` would have as its prompt."""
        asked = await self._read(request, CountRequest, neutral.MESSAGES)
        self._service.check_model(asked.model)
        ids = await self._message_ids(asked, self._service.info())
        return json_response({"input_tokens": len(ids)})

    async def _read(self, request: Request, kind: type[Any], allowed: Any) -> Any:
        options = self._service.options
        return body.decode(await body.read(request, options.max_body_bytes, options.body_timeout), kind, allowed)

    async def _ids(self, prompt: str | list[int], asked: CompletionRequest, info: Info) -> list[int]:
        if not isinstance(prompt, str):
            return truncated(prompt, asked.truncate_prompt_tokens, info.max_model_len)
        add = asked.add_special_tokens is not False
        return await self._service.encode([prompt], info, asked.truncate_prompt_tokens, add)

    async def _message_ids(self, asked: CountRequest, info: Info) -> list[int]:
        chat = chat_of(asked)
        pieces = self._service.chat_text(chat, continue_final_message=chat[-1]["role"] == "assistant")
        return await self._service.encode(pieces, info, add_special_tokens=False)

    async def _answer(
        self,
        request: Request,
        stream: bool | None,
        job: Job,
        answer: CompletionAnswer | ChatAnswer | MessagesAnswer,
        failed: Callable[[ApiError], bytes],
    ) -> Response:
        if not stream:
            return json_response(await unless_gone(request.receive, answer.whole(), job.close))
        options = self._service.options
        chunks: AsyncIterator[bytes] = answer.chunks()
        return EventStream(
            chunks, job.close, failed, stream_timeout=options.stream_timeout, keep_alive=options.keep_alive
        )


def _id(prefix: str, given: str | None = None) -> str:
    return prefix + (given or uuid.uuid4().hex)
