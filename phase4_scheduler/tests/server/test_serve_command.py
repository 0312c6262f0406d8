"""`titan serve` from its start to its end: mistakes, signals, and what it may not import."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from phase4_scheduler.server.serve import warn_if_open
from phase4_scheduler.tests.server.conftest import COMMAND, PATIENCE, Server

SLOW = ("null", "--settings", '{"step_seconds": 0.01}')


def titan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE)


def children(pid: int) -> list[int]:
    """Of a process, by /proc."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.is_file() else []


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").is_file() and ") Z " in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("no-such-model",), "no-such-model"),
        (("null", "--max-num-seqs", "0"), "max_num_seqs"),
        (("null", "--settings", '{"stepseconds": 1}'), "did you mean step_seconds?"),
        (("null", "--settings", "{"), "--settings"),
        (("null", "--scheduling-policy", "lottery"), "lottery"),
        (("null", "--host", "203.0.113.1"), "203.0.113.1"),
        (("null", "--use", "phase4=theirs"), "theirs"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: tuple[str, ...], told: str) -> None:
    done = titan("serve", *arguments, "--port", "0")
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len([line for line in done.stderr.splitlines() if "warning" not in line]) == 1, done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        done = titan("serve", "null", "--port", str(sock.getsockname()[1]))
    assert done.returncode == 2
    assert "choose another --port" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_unknown_flag_is_named() -> None:
    done = titan("serve", "null", "--no-such-flag")
    assert done.returncode == 2 and "--no-such-flag" in done.stderr and "Traceback" not in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom module0_profiling.cli import make_app\nmake_app()\n"
        "print([m for m in ('torch', 'fastapi', 'zmq', 'uvicorn', 'msgspec', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_api_process_never_imports_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, phase4_scheduler.server as server\n"
        "names = [m.name for m in pkgutil.iter_modules(server.__path__)]\n"
        "[importlib.import_module('phase4_scheduler.server.' + name) for name in names]\n"
        "print(len(names) > 20, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == "True False", done.stderr


def test_a_server_for_everybody_warns_unless_it_has_a_key() -> None:
    assert warn_if_open("127.0.0.1", ()) == "" == warn_if_open("0.0.0.0", ("key",))
    assert "--api-key" in warn_if_open("0.0.0.0", ())


def test_the_first_signal_drains_and_nothing_is_lost(tmp_path: Path) -> None:
    server = Server(*SLOW, log=tmp_path / "log").wait_ready()
    engine = children(server.process.pid)
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        asked = {"prompt": "x", "max_tokens": 150, "n": 2}
        working = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{server.url}/v1/completions", json=asked, timeout=PATIENCE, trust_env=False)
                )
            )
            for _ in range(4)
        ]
        for thread in working:
            thread.start()
        _wait(lambda: client.get("/load").json()["in_flight"] == 4)
        server.process.send_signal(signal.SIGTERM)
        _wait(lambda: client.get("/ready").status_code == 503)
        refused = client.post("/v1/completions", json=asked)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert client.get("/health").status_code == 200
    for thread in working:
        thread.join(PATIENCE)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(answer.json()["usage"]["completion_tokens"] == 300 for answer in answers)
    assert server.stop() == 0
    assert all(gone(pid) for pid in engine)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("how", ["second signal", "time-out"])
def test_then_what_still_runs_is_aborted_with_an_end(tmp_path: Path, how: str) -> None:
    more = ("--shutdown-timeout", "0.3") if how == "time-out" else ()
    server = Server(*SLOW, *more, log=tmp_path / "log").wait_ready()
    asked = {"prompt": "x", "max_tokens": 8000, "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=asked, timeout=PATIENCE, trust_env=False
    ) as response:
        lines = response.iter_lines()
        next(lines)
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        if how == "second signal":
            server.process.send_signal(signal.SIGTERM)
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]" and '"finish_reason":"abort"' in told[-2]
    assert server.stop() == 0
    assert time.monotonic() - began < 20
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("moment", range(4))
def test_a_signal_at_any_moment_ends_it_cleanly(tmp_path: Path, moment: int) -> None:
    """F24: during imports, while the engine starts, when it is ready."""
    rng = random.Random(moment)
    server = Server(*SLOW, log=tmp_path / "log")
    _wait(lambda: signal_is_handled(server.process.pid))
    time.sleep(rng.uniform(0, 1.5))  # the moment is the point: any will do
    engine = children(server.process.pid)
    for _ in range(1 + moment % 2):
        server.process.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
    assert server.stop() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    _wait(lambda: all(gone(pid) for pid in engine))


def signal_is_handled(pid: int) -> bool:
    """Whether the process has its own handlers of SIGTERM: before, Python is still starting."""
    file = Path(f"/proc/{pid}/status")
    if not file.is_file():
        return True
    caught = next(line for line in file.read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _wait(holds: object) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)
