"""One engine process and the channels to it, from the start to the funeral. Who starts the next one: supervisor.py."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from phase4_scheduler.core import wire
from phase4_scheduler.core.channels import ClientChannels

_LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[2]
_LAST_LINES = 6  # of what the process wrote, for the error message
_LONGEST_LINE = 1 << 16
_DEATH = 10.0  # seconds that a killed process may take; one that waits for a device may take for ever


@dataclass(frozen=True)
class Job:
    """What an engine is started with; the fields are those of `main.Order` that do not change between starts."""

    model: str
    settings: dict[str, Any]
    use: str = ""


class EngineProcess:
    """A child process with a session of its own, so that Ctrl-C in a terminal reaches its parent only.

    Args:
        job: what it is to do.
        context: for the sockets.
        directory: for them; made here, and not used by another process.
        on_outputs, on_control: called with each message in the running event loop.
    """

    def __init__(
        self,
        job: Job,
        context: zmq.Context[zmq.Socket[bytes]],
        directory: Path,
        on_outputs: Callable[[wire.Outputs], None],
        on_control: Callable[[wire.Hello | wire.Pulse | wire.Fault], None],
    ) -> None:
        directory.mkdir(mode=0o700)
        self._job, self._directory = job, directory
        self.channels = ClientChannels(context, directory)
        self.channels.listen(on_outputs, on_control)
        self._process: asyncio.subprocess.Process | None = None
        self._echo: asyncio.Task[None] | None = None
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    @property
    def pid(self) -> int | None:
        """None before it started."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start it. The fork is made in the thread of the event loop: the child dies with that thread (lifeline.py)."""
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "phase4_scheduler.core.main",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
            limit=_LONGEST_LINE,
        )
        order = {
            "model": self._job.model,
            "settings": self._job.settings,
            "use": self._job.use,
            "channels": str(self._directory),
            "parent": os.getpid(),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._echo = asyncio.create_task(self._pass_on())

    async def exited(self) -> int:
        """Wait for its end; returns the exit status, negative for a signal. What it had sent has been handled then."""
        assert self._process is not None and self._echo is not None
        status = await self._process.wait()
        self._kill_group()
        self.channels.drain()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._echo), 0.5)
        return status

    def kill(self) -> None:
        """SIGKILL, for its children too."""
        if self._process is not None and self._process.returncode is None:
            self._kill_group()
            with suppress(ProcessLookupError):
                self._process.kill()

    async def bury(self) -> None:
        """Kill it if it lives, and forget what it left."""
        self.kill()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), _DEATH)
            except TimeoutError:
                _LOG.error("process %d does not die: a driver holds it, its memory is not free", self._process.pid)
            assert self._process.stdin is not None
            self._process.stdin.close()
        if self._echo is not None:
            self._echo.cancel()
            await asyncio.gather(self._echo, return_exceptions=True)
        self.channels.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _kill_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says the second of zombies
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _pass_on(self) -> None:
        """What it writes goes to our standard error; the last lines are kept."""
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout
        while True:
            try:
                line = await stream.readuntil(b"\n")
            except asyncio.IncompleteReadError as end:
                line = end.partial
                if not line:
                    return
            except asyncio.LimitOverrunError as overrun:
                line = await stream.read(overrun.consumed)
            text = line.decode(errors="replace")
            if text.strip():
                self.last_lines.append(text.rstrip())
            with suppress(OSError, ValueError):  # a closed terminal is no reason to stop reading
                sys.stderr.write(text)
                sys.stderr.flush()
