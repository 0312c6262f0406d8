"""`titan serve` as somebody who is treated badly: killed, stopped, starved, watched. POSIX only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from module0_profiling import rooms
from module0_profiling.bench_gpu import CheckFailed
from phase4_scheduler.measures.our_server import titan

PATIENCE = 120.0  # seconds; machines may be loaded
_LOOK = 0.02  # seconds between two looks


class Victim:
    """A server in processes of its own, on a free port: `with Victim("null") as victim: victim.wait_ready()`.

    Args:
        model: directory, shipped name or "null".
        settings: of the engine.
        options: of the command line.
        limits: for `ulimit`, as "-n 80"; "": ours.
        directory: for its temporary files, which nobody removes after `kill -9`; None: one that is removed at the end.

    Attributes:
        process: the API's.
        url: once it is ready.
    """

    def __init__(
        self,
        model: str,
        settings: dict[str, Any] | None = None,
        options: Sequence[str] = (),
        *,
        limits: str = "",
        directory: Path | None = None,
    ) -> None:
        command = [*titan(), "serve", model, "--port", "0", "--settings", json.dumps(settings or {}), *options]
        limited = ["sh", "-c", f'ulimit {limits} && exec "$@"', "sh"] if limits else []
        self._command = [*limited, *command]
        self._directory = directory
        self.url = ""

    def __enter__(self) -> Self:
        self._holder = tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)
        directory = str(self._directory or self._holder.name)
        more = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TMPDIR": directory}
        kept = {name: value for name, value in os.environ.items() if name != "TITAN_API_KEY"}
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self._command, cwd=rooms.ROOT, env=kept | more, stdout=self._log, stderr=subprocess.STDOUT
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill whatever is left."""
        left = self.family() if self.process.poll() is None else []
        for process in left:
            kill(process)
        self.process.wait(PATIENCE)
        self._log.close()
        self._holder.cleanup()

    @property
    def log(self) -> str:
        """Everything that it wrote."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def wait_ready(self, patience: float = PATIENCE) -> Self:
        """Wait until it says that it serves.

        Raises:
            CheckFailed: it ended, or it took too long; what it wrote.
        """
        wait(lambda: "is ready at" in self.log or self.process.poll() is not None, "it is not ready", patience)
        found = re.search(r"is ready at (http://\S+)", self.log)
        if found is None:
            raise CheckFailed(f"the server ended with {self.process.returncode}: {self.log}")
        self.url = found[1]
        return self

    def engine(self) -> psutil.Process | None:
        """The engine's process of now."""
        for process in self.family()[1:]:
            try:
                if "phase4_scheduler.core.main" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        return None

    def family(self) -> list[psutil.Process]:
        """Its process and all that came of it."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self, number: signal.Signals = signal.SIGTERM, patience: float = PATIENCE) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(patience)

    def load(self) -> dict[str, Any]:
        """GET /load."""
        found: dict[str, Any] = json.loads(self.get("/load")[1])
        return found

    def metrics(self) -> dict[str, float]:
        """GET /metrics: values by name, and by name{reason} for what has one."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                reason = sample.labels.get("finished_reason") or sample.labels.get("reason") or ""
                name = f"{sample.name}{{{reason}}}" if reason else sample.name
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()


def wait(holds: Callable[[], object], otherwise: str, patience: float = PATIENCE) -> float:
    """Wait until a condition holds; returns the seconds. Raises CheckFailed if it does not in time."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > patience:
            raise CheckFailed(f"{otherwise} after {patience:g} s")
        time.sleep(_LOOK)
    return time.monotonic() - began


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, buried or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(process: psutil.Process) -> None:
    """`kill -9`, of one that may be gone."""
    with suppress(psutil.NoSuchProcess):
        process.kill()
