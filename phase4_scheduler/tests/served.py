"""`titan serve` in a process of its own, as a user starts it, for tests of clients."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TITAN = (sys.executable, "-c", "from module0_profiling.cli import main; main()")
PATIENCE = 120.0  # seconds; machines may be loaded


def environment() -> dict[str, str]:
    """That of this process, with the repository on the path and no key."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TITAN_API_KEY", "IMPL")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "140", "PYTHONUNBUFFERED": "1"}


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Serve on a free port until the block ends; yields the URL when the model is ready."""
    with tempfile.TemporaryFile("w+") as log:
        command = [*TITAN, "serve", *arguments, "--port", "0"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _url(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def _url(process: subprocess.Popen[bytes], log) -> str:
    deadline = time.monotonic() + PATIENCE
    while True:
        log.seek(0)
        said = log.read()
        if found := re.search(r"is ready at (http://\S+)", said):
            return found[1]
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.05)
