"""Keeps one engine process alive: starts it, listens to its heart, and buries and replaces it when it died or hangs.

    starting -> ready -> (hung -> ready | restarting) -> ready ...        broken: it dies again and again

The client sees the states and is told of three things: ready, died, and that there will be no other one (`Listener`).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from phase0_prototype.errors import UserError
from phase4_scheduler.core import wire
from phase4_scheduler.core.channels import private_directory
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.core.process import EngineProcess, Job
from phase4_scheduler.core.restarts import Breaker
from phase4_scheduler.core.supervision import Listener, State, Supervision

_LOG = logging.getLogger(__name__)
_TICKS = 10  # in which the silence of `hang_timeout` is counted


class Supervisor:
    """One engine after the other, one at a time.

    Args:
        job: what engines are started with.
        supervision: how patient to be.
        listener: is told what happens.

    Attributes:
        state: see above; "stopping" and "stopped" after `stop`.
        info: of the engine, once one was ready.
        restarts: engines after the first.
        failure: why there is none, in state "broken".
    """

    def __init__(self, job: Job, supervision: Supervision, listener: Listener) -> None:
        self._job, self._patience, self._listener = job, supervision, listener
        self.state: State = "starting"
        self.info: wire.Info | None = None
        self.restarts = 0
        self.failure: EngineError | UserError | None = None
        self.start_seconds = 5.0  # that a start takes: a guess until there was one
        self._breaker = Breaker(
            supervision.max_restarts, supervision.window, supervision.pause, supervision.longest_pause
        )
        self._process: EngineProcess | None = None
        self._hello: asyncio.Future[wire.Hello] | None = None
        self._fault: wire.Fault | None = None
        self._ready_at: float | None = None
        self._heard = False  # anything, since the last tick
        self._next_start = 0.0
        self._life: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the engine's process of now."""
        return None if self._process is None else self._process.pid

    def retry_after(self) -> float | None:
        """Seconds until an engine may be ready; None: there will be none."""
        if isinstance(self.failure, UserError) or self.state in ("stopping", "stopped"):
            return None
        if self.state == "ready":
            return 1.0
        return max(1.0, self._next_start - time.monotonic() + self.start_seconds)

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._life = asyncio.create_task(self._live())

    def send(self, message: wire.ToEngine) -> bool:
        """False when no engine can take it now."""
        return self.state == "ready" and self._process is not None and self._process.channels.send_request(message)

    async def stop(self) -> None:
        """End the process: politely where it listens, and surely."""
        listens, self.state = self.state == "ready", "stopping"
        process = self._process
        if process is not None and listens and process.channels.send_stop():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.exited(), self._patience.grace)
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        self.state = "stopped"

    async def _live(self) -> None:
        """One process after the other, each in a directory of its own."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        generation = 0
        try:
            with private_directory() as directory:
                while self.state != "stopping":
                    generation += 1
                    error = await self._one_process(context, Path(directory) / str(generation))
                    if (pause := self._bereaved(error)) is None:
                        return
                    await asyncio.sleep(pause)
                    self.restarts += 1
        except Exception as error:  # such as a full disk: nobody must wait for an engine that nobody looks after
            _LOG.exception("the engine is not looked after any more")
            self.failure, self.state = EngineError(f"the engine can't be started: {error}"), "broken"
            self._listener.on_broken(self.failure)
        finally:
            context.destroy(linger=0)

    def _bereaved(self, error: Exception) -> float | None:
        """Tell the client; returns the seconds until the next start, None when there will be none."""
        if self.state == "stopping":
            return None
        if isinstance(error, UserError) and self.info is None:  # the same settings will not do next time either
            self.failure, self.state = error, "broken"
            self._listener.on_broken(error)
            return None
        now = time.monotonic()
        pause = self._breaker.died(now, 0.0 if self._ready_at is None else now - self._ready_at)
        self._next_start = now + pause
        self.state = "broken" if self._breaker.open else "restarting"
        failed = EngineError(str(error), self.retry_after())
        if self._breaker.open:
            self.failure = failed
            self._listener.on_broken(failed)
        else:
            self._listener.on_death(failed)
        return pause

    async def _one_process(self, context: zmq.Context[zmq.Socket[bytes]], directory: Path) -> Exception:
        """Start a process and watch it to its end; returns why it ended."""
        self._hello, self._fault, self._ready_at = asyncio.get_running_loop().create_future(), None, None
        process: EngineProcess | None = None
        try:
            process = EngineProcess(self._job, context, directory, self._on_outputs, self._on_control)
            self._process = process
            await process.start()
            exited = asyncio.create_task(process.exited())
            try:
                hung = await self._accompany(process, exited)
                process.kill()
                return self._why(process, await exited, hung)
            finally:
                exited.cancel()
        except (OSError, zmq.ZMQError) as error:  # such as too many open files: there may be some next time
            return EngineError(f"the engine's process could not be started: {error}")
        finally:
            self._process = None
            if process is not None:
                await process.bury()

    async def _accompany(self, process: EngineProcess, exited: asyncio.Task[int]) -> str:
        """From the start to the end, or to where it has to end: then why."""
        began, hello = time.monotonic(), self._hello
        assert hello is not None
        either: set[asyncio.Future[Any]] = {exited, hello}
        await asyncio.wait(either, timeout=self._patience.start_timeout, return_when=asyncio.FIRST_COMPLETED)
        if not hello.done():
            return "" if exited.done() else f"the engine was not ready in {self._patience.start_timeout:g} s"
        while not process.channels.writable() and not exited.done():  # it connects within a moment of its Hello
            await asyncio.sleep(0.001)
        if self.state != "stopping":
            self.info, self.failure, self.state = hello.result().info, None, "ready"
            self._ready_at = time.monotonic()
            self.start_seconds = self._ready_at - began
            self._listener.on_ready()
        return await self._watch(exited)

    async def _watch(self, exited: asyncio.Task[int]) -> str:
        """Until the process ends, or has been silent for too long: then why it has to.

        Silence is counted in ticks of our own clock: while this process is stopped or busy, none goes by, and messages
        that came meanwhile are read before the next one.
        """
        patience, silent = self._patience, 0
        tick = patience.hang_timeout / _TICKS
        while True:
            self._heard = False
            await asyncio.wait({exited}, timeout=tick)
            if exited.done():
                return ""
            silent = 0 if self._heard else silent + 1
            if silent >= _TICKS and silent * tick >= patience.hang_timeout + patience.hang_grace:
                return f"the engine hangs: its step loop has said nothing for {silent * tick:.1f} s"
            if self.state in ("ready", "hung"):
                self.state = "hung" if silent >= _TICKS else "ready"

    def _on_outputs(self, outputs: wire.Outputs) -> None:
        self._heard = True
        self._listener.on_outputs(outputs)

    def _on_control(self, message: wire.Hello | wire.Pulse | wire.Fault) -> None:
        self._heard = True
        if isinstance(message, wire.Fault):
            self._fault = message
        elif isinstance(message, wire.Hello) and self._hello is not None and not self._hello.done():
            self._hello.set_result(message)

    def _why(self, process: EngineProcess, status: int, hung: str) -> Exception:
        """One line."""
        fault = self._fault
        if fault is not None and fault.is_user_error:
            return UserError(fault.message)
        if fault is not None:
            return EngineError(f"the engine failed: {fault.message}")
        said = f"; it said last: {process.last_lines[-1]}" if process.last_lines else ""
        if hung:
            return EngineError(hung + said)
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return EngineError(f"the engine's process ended ({name}){said}")
