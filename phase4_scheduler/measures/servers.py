"""Servers as processes, for a measurement: started, waited for, stopped while another one is measured, ended.

Two servers that are compared are up at once, and the one that is not measured is halted with SIGSTOP, all its processes
with it: it takes no time from the other, and both see the same machine within seconds. A measurement that is killed
leaves no server behind (guardian.py). POSIX only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from module0_profiling import rooms
from module0_profiling.bench_gpu import CheckFailed

HOST = "127.0.0.1"
PATIENCE = 900.0  # seconds for a start: a peer that compiles takes minutes
POLL = 0.02  # seconds between two looks at a server that starts
GUARDIAN = Path(__file__).with_name("guardian.py")
GRACE = 20.0  # seconds between asking a server to end and killing it


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        name: in figures.
        arguments: the command.
        port: where it will listen, on 127.0.0.1.
        environment: variables beside those of this process.
        ready: path that answers 200 once requests are served.
    """

    name: str
    arguments: Sequence[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/ready"

    def __str__(self) -> str:
        """As one would type it; the port and the folder of an executable say nothing."""
        words = [*(f"{k}={v}" for k, v in self.environment.items()), *self.arguments]
        return " ".join(Path(word).name if os.sep in word else word for word in words)


class Server:
    """A server that runs, as a context: `with Server(launch) as server: server.wait_until_ready()`."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.url = f"http://{HOST}:{launch.port}"
        self._halted: list[psutil.Process] = []

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            self.launch.arguments,
            cwd=rooms.ROOT,
            env={**os.environ, **self.launch.environment},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, and we end it
        )
        self._guardian = subprocess.Popen(
            (sys.executable, str(GUARDIAN), str(self._process.pid)), stdin=subprocess.PIPE, start_new_session=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask it to end, and kill what is left."""
        self.resume()
        processes = self.processes()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        for process in processes:
            if process.is_running():
                _signal(process, signal.SIGKILL)
        psutil.wait_procs(processes, GRACE)
        self._guardian.kill()  # before the number of the process may be another's
        self._guardian.communicate()
        self._process.wait()
        self._log.close()

    def wait_until_ready(self, path: str = "", timeout: float = PATIENCE) -> float:
        """Wait until a path answers 200, by default the launch's; returns the seconds since the start.

        Raises:
            CheckFailed: the process ended or took too long; what it wrote last.
        """
        while not answers(self.url + (path or self.launch.ready)):
            waited = time.perf_counter() - self._began
            if self._process.poll() is not None:
                raise CheckFailed(f"{self.launch.name} ended with status {self._process.returncode}: {self._said()}")
            if waited > timeout:
                raise CheckFailed(f"{self.launch.name} was not ready after {timeout:.0f} s: {self._said()}")
            time.sleep(POLL)
        return time.perf_counter() - self._began

    def processes(self) -> list[psutil.Process]:
        """Its process and all that came of it, parents first."""
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def halt(self) -> None:
        """Stop the clock of all its processes, parents first: none looks after a child that has stopped."""
        self._halted = self.processes()
        for process in self._halted:
            _signal(process, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on, children first, so that they have answered when somebody asks."""
        for process in reversed(self._halted):
            _signal(process, signal.SIGCONT)
        self._halted = []

    @contextmanager
    def halted(self) -> Iterator[None]:
        """Stopped inside a `with`."""
        self.halt()
        try:
            yield
        finally:
            self.resume()

    def _said(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it wrote nothing"


def answers(url: str) -> bool:
    """Whether there is a server and it says 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
