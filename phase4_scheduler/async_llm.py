"""The engine, used from asyncio: it runs in a process of its own, and requests are streams.

    llm = AsyncLLM("titan-tiny")
    await llm.start()
    await llm.ready()
    async with llm.submit("def add(a, b):", SamplingParams(temperature=0, max_tokens=64)) as stream:
        async for pieces in stream:
            print(pieces[0].text, end="", flush=True)
    await llm.shutdown()

Nothing here imports torch: a server that uses it answers while the engine still loads. Each request ends exactly once,
whatever happens: by its last token, by `cancel`, when its time is over, at `shutdown`, or with one `EngineError` when
the engine dies. A request of which the reader has seen nothing by then is given to the next engine instead, once.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from phase0_prototype.errors import UserError
from phase0_prototype.hub import resolve_model
from phase0_prototype.outputs import RequestOutput
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.seeds import derive_seed
from phase0_prototype.tokenizer import Tokenizer, load_tokenizer
from phase4_scheduler.core import wire
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.core.process import Job
from phase4_scheduler.core.supervision import State, Supervision
from phase4_scheduler.core.supervisor import Supervisor
from phase4_scheduler.in_flight import InFlight
from phase4_scheduler.output_stream import Piece, Stream
from phase4_scheduler.request_checks import check_urgency, differing, encode

__all__ = ["AsyncLLM", "EngineError", "Piece", "Stream", "Supervision"]

_LOG = logging.getLogger(__name__)
NULL = "null"  # the engine without a model, which speaks the shipped model's tokens


class AsyncLLM:
    """A model in a process of its own; see the top of this file. Made and used in one event loop.

    Args:
        model: directory, shipped name, hub id, or "null" for tokens without a model.
        settings: of the engine: fields of `ServingConfig`, or of `NullConfig`.
        use: which implementation of the course's parts, as in "phase4=mine".
        supervision: how patient to be with the engine.

    Attributes:
        tokenizer: of the checkpoint, once `ready`; None where it has none.
        stats: the newest.
    """

    def __init__(
        self,
        model: str,
        settings: dict[str, Any] | None = None,
        *,
        use: str = "",
        supervision: Supervision = Supervision(),  # noqa: B008  it is frozen
    ) -> None:
        self.model, self.stats = model, wire.EMPTY
        self.tokenizer: Tokenizer | None = None
        settings = settings or {}
        seed = settings.get("seed", 0)
        self._seed = seed if isinstance(seed, int) else 0  # the engine says what is wrong with it
        self._supervisor = Supervisor(Job(model, settings, use), supervision, self)
        self._in_flight = InFlight(self._supervisor.send)
        self._count = 0
        self._failure: UserError | None = None
        self._settled = asyncio.Event()  # ready or broken
        self._loading: asyncio.Task[None] | None = None
        self._closing = False

    # --- the engine ---

    @property
    def state(self) -> State:
        """starting | ready | hung | restarting | broken | stopping | stopped."""
        state = self._supervisor.state
        if state == "stopped":
            return state
        if self._closing:
            return "stopping"
        if self._failure is not None:
            return "broken"
        return "starting" if state == "ready" and self._loading is not None and not self._loading.done() else state

    @property
    def info(self) -> wire.Info | None:
        """Of the model; None until an engine was ready."""
        return self._supervisor.info

    @property
    def restarts(self) -> int:
        """Engines after the first."""
        return self._supervisor.restarts

    @property
    def retry_after(self) -> float | None:
        """Seconds after which an engine may be there that isn't now; None: nobody knows, or there is one."""
        return self._supervisor.retry_after()

    @property
    def pid(self) -> int | None:
        """Of the engine's process of now."""
        return self._supervisor.pid

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._in_flight)

    async def start(self) -> None:
        """Begin to load; returns at once."""
        self._loading = asyncio.create_task(asyncio.to_thread(self._load_tokenizer))
        self._supervisor.start()

    async def ready(self, timeout: float | None = None) -> wire.Info:
        """Wait until requests are taken, or after a crash are taken again.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            UserError: what the engine says of the model or the settings.
            EngineError: it keeps dying, or does not come in time.
        """
        if self._loading is None:
            raise RuntimeError("call start() first")
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._loading)
                if self._failure is None:
                    await self._settled.wait()
        except TimeoutError:
            raise EngineError(
                f"the engine was not ready within {timeout:g} s", self._supervisor.retry_after()
            ) from None
        failure = self._failure or self._supervisor.failure
        if failure is not None:
            raise failure
        if self.info is None or self._closing:
            raise EngineError("the engine is being stopped")
        return self.info

    async def drained(self, timeout: float | None = None) -> bool:
        """Wait until no request is open, at most so many seconds; returns whether none is."""
        try:
            await asyncio.wait_for(self._in_flight.empty.wait(), timeout)
        except TimeoutError:
            return not self.in_flight
        return True

    async def shutdown(self, timeout: float = 0.0) -> None:
        """Take no more requests, wait so long for those that are open, abort the rest, and end the engine's process.

        When it returns, the process and the sockets' directory are gone. May be called again, as to wait no longer.
        """
        self._closing = True
        if timeout > 0:
            await self.drained(timeout)
        self._in_flight.cancel_all("shutdown")
        self._settled.set()
        await self._supervisor.stop()
        self._in_flight.fail_all("the engine was stopped", None)
        if self._loading is not None:
            await asyncio.gather(self._loading, return_exceptions=True)

    # --- requests ---

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        prompt_text: str | None = None,
    ) -> Stream:
        """Queue a prompt.

        Args:
            prompt: text or token ids.
            params: how to choose tokens.
            request_id: not that of an open request; by default a number.
            priority: smaller is more urgent, where the engine's policy looks at it.
            timeout: seconds after which nobody wants the answer; what there is by then is its answer ("abort").
            prompt_text: what to give as the prompt's text when it comes as token ids.

        Raises:
            UserError: about the prompt.
            EngineError: there is no engine now.
        """
        if self.state != "ready":
            raise self._refusal()
        assert self.info is not None
        check_urgency(priority, timeout)
        ids = encode(prompt, self.tokenizer, self.info)
        number = str(self._count)
        name = number if request_id is None else request_id
        if name in self._in_flight:
            raise UserError(f"request id {name!r} is that of an open request: give another, or none")
        seed = derive_seed(self._seed, self._count)
        message = wire.Add(number, ids, differing(params), seed, priority, timeout)
        if not self._supervisor.send(message):
            raise EngineError("the engine does not read its requests", 1.0)
        self._count += 1
        stream = Stream(
            name,
            prompt if isinstance(prompt, str) else prompt_text,
            ids,
            params,
            self.tokenizer,
            abort=lambda index: self._in_flight.abort(number, index),
            on_end=lambda: self._in_flight.forget(number),
        )
        self._in_flight.add(message, stream)
        return stream

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> RequestOutput:
        """The whole answer; arguments and errors as for `submit`. Cancelling the task cancels the request."""
        async with self.submit(prompt, params, request_id=request_id, priority=priority, timeout=timeout) as stream:
            return await stream.output()

    def cancel(self, request_id: str) -> None:
        """End a request with finish_reason "abort"; one that is unknown or has ended is ignored."""
        self._in_flight.cancel(request_id)

    # --- what the supervisor tells (Listener) ---

    def on_ready(self) -> None:
        """Requests that were waiting for this engine go first."""
        self._in_flight.send_again()
        self._settled.set()

    def on_outputs(self, outputs: wire.Outputs) -> None:
        """What a step has made."""
        if outputs.stats is not None:
            self.stats = outputs.stats
        self._in_flight.deliver(outputs)

    def on_death(self, error: EngineError) -> None:
        """Another engine is coming."""
        _LOG.warning("%s; starting it again", error)
        self._settled.clear()
        self.stats = wire.EMPTY
        self._in_flight.bereave(error)

    def on_broken(self, error: EngineError | UserError) -> None:
        """Nobody is kept waiting."""
        retry_after = error.retry_after if isinstance(error, EngineError) else None
        if retry_after is not None:
            _LOG.error("%s, again and again; next try in about %.0f s", error, retry_after)
        self.stats = wire.EMPTY
        self._in_flight.fail_all(str(error), retry_after)
        self._settled.set()

    # --- within ---

    def _load_tokenizer(self) -> None:
        try:
            self.tokenizer = load_tokenizer(resolve_model("titan-tiny" if self.model == NULL else self.model))
        except UserError as error:
            self._failure = error

    def _refusal(self) -> EngineError:
        failure = self._failure or self._supervisor.failure
        why = f": {failure}" if self.state == "broken" and failure is not None else ""
        if self._failure is not None:
            return EngineError(f"the engine is {self.state}{why}")
        return EngineError(f"the engine is {self.state}{why}", self._supervisor.retry_after())
