"""Processes that are killed, stopped and signalled, and what is left of them."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from phase4_scheduler.measures.chaos import last_wave
from phase4_scheduler.measures.chaos_oracle import of_null
from phase4_scheduler.measures.chaos_plan import asks
from phase4_scheduler.measures.chaos_server import PATIENCE, Victim, is_gone, kill, wait
from phase4_scheduler.measures.chaos_signals import start_time, while_starting
from phase4_scheduler.tests.chaos.conftest import NULL, OPTIONS

WITHIN = 3.0  # seconds in which nothing may be left of a family whose parent was killed


def post(victim: Victim, **fields: object) -> socket.socket:
    """Send a completion; the caller reads and closes."""
    body = json.dumps({"prompt": "x", **fields}).encode()
    sock = socket.create_connection(("127.0.0.1", int(victim.url.rpartition(":")[2])), timeout=PATIENCE)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return sock


def read(sock: socket.socket) -> bytes:
    """All of an answer."""
    with sock:
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_f03_a_server_whose_engine_hangs_says_so_and_answers_all_the_same() -> None:
    """Stopped from outside, and in a step that never ends: the heart is in the step loop, so both are seen."""
    with Victim("null", {"step_seconds": 600.0}, ["--hang-timeout", "1"]) as victim:
        victim.wait_ready()
        engine = victim.engine()
        assert engine is not None and victim.get("/health")[0] == 200
        engine.suspend()
        wait(lambda: victim.get("/health")[0] == 503, "nobody noticed")
        assert victim.get("/ready")[0] == 503 and victim.get("/version")[0] == 200
        refused = read(post(victim))
        assert refused.startswith(b"HTTP/1.1 503") and b"retry-after" in refused
        engine.resume()
        wait(lambda: victim.get("/health")[0] == 200, "it does not come back")
        with post(victim, max_tokens=2):
            wait(lambda: victim.get("/health")[0] == 503, "nobody noticed a step without end")
            assert victim.get("/metrics")[0] == 200
        victim.process.send_signal(signal.SIGTERM)
        assert victim.end() == 0
        assert is_gone(engine)


def test_f04_nothing_outlives_a_killed_api_and_a_killed_engine_is_replaced() -> None:
    """`kill -9` of each process in turn, under load; children of others are not touched, and the port is free again."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with Victim("null", NULL, OPTIONS) as victim:
            victim.wait_ready()
            first = victim.engine()
            assert first is not None
            with post(victim, max_tokens=2000, stream=True) as streaming:
                assert streaming.recv(100)
                kill(first)
                wait(lambda: victim.get("/ready")[0] == 200 and victim.engine() not in (None, first), "no other came")
            with post(victim, max_tokens=2000, stream=True) as streaming:
                assert streaming.recv(100)
                family = victim.family()
                assert len(family) == 2 and is_gone(first)
                victim.process.kill()
                wait(lambda: all(map(is_gone, family)), f"{family} is left", WITHIN)
            victim.process.wait()  # its last thread holds the port
            host, _, port = victim.url.removeprefix("http://").partition(":")
            with socket.socket() as again:
                again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                again.bind((host, int(port)))
                again.listen()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_f05_a_server_without_an_engine_refuses_with_a_time_to_come_back_and_serves_again_soon() -> None:
    began = time.monotonic()
    with Victim("null", NULL, OPTIONS) as victim:
        victim.wait_ready()
        cold = time.monotonic() - began
        engine = victim.engine()
        assert engine is not None
        streaming = [post(victim, max_tokens=2000, stream=True) for _ in range(10)]
        assert all(one.recv(20) for one in streaming)
        kill(engine)
        wait(lambda: victim.load()["state"] != "ready" or victim.load()["restarts"], "nobody noticed")
        refused = read(post(victim))
        if not refused.startswith(b"HTTP/1.1 200"):  # the new engine may have been faster
            assert refused.startswith(b"HTTP/1.1 503") and b"retry-after: " in refused
        assert victim.get("/health")[0] == 200
        for answer in map(read, streaming):
            assert answer.count(b'data: {"error":{') == 1 and answer.count(b"data: [DONE]") == 1
        again = wait(lambda: victim.load()["restarts"] == 1 and victim.get("/ready")[0] == 200, "it does not come back")
        assert again < 2 * cold + 2
        assert read(post(victim, max_tokens=3)).startswith(b"HTTP/1.1 200")


def test_f24_signals_while_a_server_starts_end_it_and_leave_nothing() -> None:
    usual = start_time("null", NULL)
    rng = random.Random(24)
    kinds = [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)]
    for i in range(8):
        moment = usual * (i + rng.random()) / 7
        assert while_starting("null", NULL, moment, kinds[i % len(kinds)]) == []


@pytest.mark.parametrize("again", [0.05, 0.5])
def test_f24_a_second_signal_aborts_what_the_first_let_run(again: float) -> None:
    """Each request that was let in has its one end: what there is of it, as "abort"."""
    with Victim("null", NULL | {"step_seconds": 0.02}, OPTIONS) as victim:
        victim.wait_ready()
        long = asks(20, 6, shortest=1500, longest=1800, calm=True)
        report = last_wave(victim, long, of_null(), signals=(0.0, again))
        assert report.faults == []
        assert report.seconds < PATIENCE
        assert report.books["abort"] > 0 and report.books["length"] == 0


def test_f13_nobody_but_this_machine_is_listened_to(null: Victim) -> None:
    listening = [c.laddr for p in null.family() for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [f"http://{address.ip}:{address.port}" for address in listening] == [null.url]
    paths = {Path(c.laddr) for p in null.family() for c in p.net_connections("unix") if c.laddr}
    named = [path for path in paths if path.is_absolute()]
    assert {path.name for path in named} == {"requests", "outputs", "control"}
    assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in named)
    assert all(path.parent.parent.stat().st_mode & 0o777 == 0o700 for path in named)
