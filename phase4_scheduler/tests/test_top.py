"""`titan top`: what it draws, what it says when the server is away, and that it comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from phase0_prototype.errors import UserError
from phase4_scheduler.core.wire import Stats
from phase4_scheduler.top import AwayError, read_load
from phase4_scheduler.top_frame import LEVELS, History, bar, frame, sparkline

ROOT = Path(__file__).parent.parent.parent
READING = {
    **{name: 0 for name in Stats.__struct_fields__},
    **{"state": "ready", "model": "titan-tiny", "uptime": 3725.4, "restarts": 2, "qps": 12.34, "in_flight": 9},
    **{"ttft_p50": 0.0213, "ttft_p99": 0.987, "itl_p50": 0.004, "itl_p99": 12.0, "running": 7, "waiting": 1234},
    **{"kv_blocks": 200, "kv_blocks_free": 150, "busy": 0.5, "preemptions": 17, "backlog_tokens": 4321},
    **{"retry_after": 8, "batch_occupancy": 6.54, "generated_tokens_per_second": 987.6},
}


def drawn(history: History, **more) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(frame(history, "http://x:1", **more))
    console.file.close()
    return console.export_text()


def test_a_frame_shows_every_figure_of_the_server():
    history = History()
    history.add(0.0, READING)
    text = drawn(history)
    for said in (
        "titan-tiny at http://x:1", "ready", "up 1:02:05, 2 engine restarts", "12.3", "p50 21.3 ms   p99 987.0 ms",
        "p50 4.0 ms   p99 12.0 s", "988 generated", "9 requests in flight", "1,234", "4,321 tokens   retry after 8 s",
        "25% of 200", "17", "6.5 sequences", "50%",
    ):  # fmt: skip
        assert said in text, said


def test_a_server_with_fewer_figures_is_drawn_all_the_same():
    history = History()
    history.add(0.0, {"state": "starting"})
    assert "starting" in drawn(history) and "0:00:00" in drawn(history)


def test_a_server_that_is_away_says_so_and_the_last_figures_stay():
    history = History()
    assert "no answer" in drawn(history, away="no answer from http://x:1 (timed out)")
    history.add(0.0, READING)
    text = drawn(history, away="no answer from http://x:1 (timed out)")
    assert "away" in text and "trying again" in text and "12.3" in text and "ready" not in text


def test_history_forgets_after_a_minute_and_sparklines_scale():
    history = History(60)
    for second in range(200):
        history.add(float(second), {"qps": second})
    series = history.series(lambda reading: reading["qps"])
    assert series == list(range(139, 200))
    assert sparkline([0, 1, 2, 4], top=4) == " " + LEVELS[2] + LEVELS[4] + LEVELS[7]
    assert sparkline([0.5, 1.0]) == LEVELS[4] + LEVELS[7] and sparkline([0, 0]) == "  " and sparkline([]) == ""
    assert len(sparkline(range(500))) == 60
    assert bar(0.25, 8) == "██░░░░░░" and bar(7.0, 4) == "████" and bar(-1, 2) == "░░"


class Load(BaseHTTPRequestHandler):
    answer: tuple[int, bytes] = (200, json.dumps(READING).encode())
    key = ""

    def do_GET(self) -> None:
        status, body = self.answer if self.path == "/load" else (404, b"")
        if self.key and self.headers["Authorization"] != f"Bearer {self.key}":
            status, body = 401, b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args) -> None:
        pass


@pytest.fixture
def server():
    """A server of /load whose answer a test can change; yields its handler class and URL."""
    handler = type("Handler", (Load,), {})
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()
    served.server_close()
    thread.join(10)


def unused_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def test_a_wrong_key_is_one_line(server):
    handler, url = server
    handler.key = "secret"
    assert read_load(url, "secret")["qps"] == 12.34
    with pytest.raises(UserError, match=r"401.*--api-key"):
        read_load(url, "wrong")


@pytest.mark.parametrize("answer", [(404, b"{}"), (200, b"<html>"), (200, b"[1]"), (200, b'{"hello": 1}')])
def test_another_kind_of_server_is_one_line(server, answer):
    handler, url = server
    handler.answer = answer
    with pytest.raises(UserError, match="titan server"):
        read_load(url)


def test_a_server_in_trouble_or_gone_is_away(server):
    handler, url = server
    handler.answer = (503, b"{}")
    with pytest.raises(AwayError, match="503"):
        read_load(url)
    with pytest.raises(AwayError, match="refused"):
        read_load(f"http://127.0.0.1:{unused_port()}")


def titan_top(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from module0_profiling.cli import main; main()", "top", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_once_prints_one_frame_or_one_line(server):
    _, url = server
    found = titan_top("--once", "--url", url)
    shown, said = found.communicate(timeout=60)
    assert found.returncode == 0 and "12.3" in shown and "titan-tiny" in shown and not said
    found = titan_top("--once", "--url", f"http://127.0.0.1:{unused_port()}")
    shown, said = found.communicate(timeout=60)
    assert found.returncode == 2 and not shown
    assert said.startswith("titan: no answer") and len(said.splitlines()) == 1 and "titan serve" in said


def test_watching_goes_on_while_the_server_is_away_and_ends_with_ctrl_c():
    port = unused_port()
    watching = titan_top("--interval", "0.1", "--url", f"http://127.0.0.1:{port}")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(watching.stdout.readline, "")), daemon=True)
    reader.start()

    def shows(what: str) -> None:
        deadline = time.monotonic() + 60
        while not any(what in line for line in lines):
            assert time.monotonic() < deadline and watching.poll() is None, (what, lines)
            time.sleep(0.02)

    try:
        shows("trying again")
        served = ThreadingHTTPServer(("127.0.0.1", port), Load)
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        shows("ready")
        served.shutdown()
        served.server_close()
        thread.join(10)
        lines.clear()
        shows("trying again")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 0
    finally:
        watching.kill()
        watching.wait(10)
        reader.join(10)
    assert "Traceback" not in watching.stderr.read()
