"""What all routes share: the engine's client, the limits, the ledger. From a checked request to a running job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.core.wire import EMPTY, Info, Stats
from phase4_scheduler.server.chat_protocol import plain_messages
from phase4_scheduler.server.chat_template import ChatTemplate
from phase4_scheduler.server.errors import ApiError, bad
from phase4_scheduler.server.job import Job
from phase4_scheduler.server.ledger import Ledger
from phase4_scheduler.server.meter import Meter
from phase4_scheduler.server.metrics import Metrics, kv_usage
from phase4_scheduler.server.options import ServerOptions
from phase4_scheduler.server.prompts import TextEncoder, chat_pieces, check_room, truncated

if TYPE_CHECKING:
    from phase4_scheduler.async_llm import AsyncLLM
    from phase4_scheduler.server.admission import Load

ROOM = "phase4_scheduler"
NULL = "null"  # the engine without a model


class Service:
    """The server without HTTP.

    Args:
        llm: the engine's client.
        options: limits.
        model: the model's name on the command line.

    Attributes:
        draining: no new request is let in, for the server is about to end.
        template: of the checkpoint, once it is known.
        created: when the server started, Unix seconds.
    """

    def __init__(self, llm: AsyncLLM, options: ServerOptions, model: str) -> None:
        self.llm, self.options = llm, options
        self.names = options.served_names or (model,)
        self.meter = Meter()
        self.metrics = Metrics(self.names[0], self.meter)
        self.ledger = Ledger(self.meter, self.metrics)
        self._admission = resolve(ROOM, "server.admission", Use.parse(options.use))
        self.admission = self._admission.Admission(options.max_num_queued_reqs, options.max_num_queued_tokens)
        self.draining = False
        self.template: ChatTemplate | None = None
        self.created = int(time.time())
        self._started = time.monotonic()
        self._encoder: TextEncoder | None = None

    @property
    def state(self) -> str:
        """Of the engine, or "draining"."""
        return "draining" if self.draining else self.llm.state

    @property
    def stats(self) -> Stats:
        """The engine's newest."""
        return self.llm.stats or EMPTY

    @property
    def encoder(self) -> TextEncoder:
        """The tokenizer.

        Raises:
            ApiError: 400; the checkpoint has none.
        """
        if self._encoder is None:
            if self.llm.tokenizer is None:
                raise bad("this model has no tokenizer: give the prompt as token ids to /v1/completions")
            self._encoder = TextEncoder(self.llm.tokenizer)
        return self._encoder

    def info(self) -> Info:
        """The model's facts.

        Raises:
            ApiError: 503; no engine takes requests now.
        """
        if self.draining:
            self.metrics.refused["draining"].inc()
            raise ApiError(503, "the server is shutting down: try another one", code="draining", retry_after=5)
        if self.llm.state != "ready" or self.llm.info is None:
            self.metrics.refused["starting" if self.llm.state == "starting" else "engine"].inc()
            raise ApiError(
                503,
                f"the engine is {self.llm.state}: try again",
                code=self.llm.state,
                retry_after=self.llm.retry_after or 2,
            )
        return self.llm.info

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 unless the name is one of this server's, or was left out."""
        if name is not None and name not in self.names:
            raise ApiError(
                404, f"the model {name!r:.100} is not served here: {', '.join(self.names)} is", code="model_not_found"
            )

    def room(self, info: Info, given: int | None) -> int:
        """Tokens that a prompt may have: one must be left for the answer."""
        return info.max_model_len - max(1, given or 1)

    async def encode(
        self,
        pieces: Sequence[str],
        info: Info,
        truncate: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Token ids of a prompt's text; of its end when it is to be truncated."""
        room = info.max_model_len if truncate is None else 1 << 40
        ids = await self.encoder.encode_pieces(pieces, room, add_special_tokens)
        return truncated(ids, truncate, info.max_model_len)

    async def encode_chat(self, request: Any, info: Info) -> list[int]:
        """Token ids of a chat: a request with messages, and what says how to render them."""
        pieces = self.chat_text(
            plain_messages(request.messages),
            request.add_generation_prompt,
            request.continue_final_message,
            request.chat_template_kwargs,
        )
        cut = getattr(request, "truncate_prompt_tokens", None)
        return await self.encode(pieces, info, cut, add_special_tokens=bool(request.add_special_tokens))

    def chat_text(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        variables: dict[str, Any] | None = None,
    ) -> list[str]:
        """The prompt of a chat, in pieces that are encoded apart.

        Raises:
            ApiError: 400; there is no template, or it refuses the messages.
        """
        if self.template is None:
            raise bad(
                f"{self.names[0]} has no chat template: use /v1/completions, or start the server with --chat-template"
            )
        add = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        try:
            return chat_pieces(
                self.template,
                self.encoder,
                messages,
                add_generation_prompt=add,
                continue_final_message=bool(continue_final_message),
                variables=variables,
            )
        except UserError as error:
            raise bad(str(error), "messages") from None

    def load(self) -> Load:
        """What is going on, for admission."""
        ledger, info = self.ledger, self.llm.info
        found: Load = self._admission.Load(
            ledger.open_seqs,
            self.stats.waiting,
            info.max_num_seqs if info else 1,
            ledger.prompt_tokens,
            ledger.backlog_tokens,
            self.meter.tokens_per_second,
        )
        return found

    def open(
        self,
        prompts: Sequence[list[int]],
        texts: Sequence[str | None],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Job:
        """Let prompts in and begin them.

        Args:
            prompts: token ids.
            texts: what they were encoded from.
            params: of all.
            priority: smaller is more urgent.
            timeout: seconds after which nobody wants the answer.

        Raises:
            ApiError: 400, 429 or 503; nothing was begun then.
        """
        info = self.info()
        if self.llm.model == NULL and (params.logprobs is not None or params.prompt_logprobs is not None):
            raise bad(
                f"the model {NULL!r} computes nothing, so it has no log-probabilities: leave them out", "logprobs"
            )
        for ids in prompts:
            check_room(ids, params, info)
        refusal = self.admission.refusal(self.load(), params.n * len(prompts), sum(map(len, prompts)))
        if refusal is not None:
            self.metrics.refused[refusal.reason].inc()
            raise ApiError(429, refusal.message, code="rate_limit_exceeded", retry_after=refusal.retry_after)
        streams = []
        try:
            for ids, text in zip(prompts, texts, strict=True):
                stream = self.llm.submit(ids, params, priority=priority, timeout=timeout, prompt_text=text)
                streams.append(stream)
        except (UserError, EngineError) as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, UserError):
                raise bad(str(error), "prompt") from None
            self.metrics.refused["engine"].inc()
            raise ApiError(503, f"{error}: try again", code="engine_error", retry_after=error.retry_after) from None
        return Job(streams, [self.ledger.open(len(ids), params.n) for ids in prompts], params)

    def sample(self) -> None:
        """Let the meter take the engine's newest counters."""
        self.meter.sample(time.monotonic(), self.stats, self.ledger.ended)

    def report(self) -> dict[str, Any]:
        """GET /load: the engine's statistics, rates and percentiles of the last seconds, and the server's state."""
        stats, ledger = self.stats, self.ledger
        return {
            **{name: getattr(stats, name) for name in stats.__struct_fields__},
            **self.meter.summary(),
            "server_load": ledger.open_prompts,
            "in_flight": ledger.open_prompts,
            "state": self.state,
            "restarts": self.llm.restarts,
            "kv_cache_usage": kv_usage(stats),
            "backlog_tokens": ledger.backlog_tokens,
            "retry_after": self._admission.retry_after(self.load()),
            "model": self.names[0],
            "uptime": time.monotonic() - self._started,
        }
