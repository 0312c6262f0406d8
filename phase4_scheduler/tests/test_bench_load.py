"""The load generator against a server that is not ours: what it sends, measures, counts and survives."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phase0_prototype.errors import UserError
from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.client import CHAT, Target, seconds_to_wait
from phase4_scheduler.bench.load import run_load
from phase4_scheduler.bench.samples import LoadResult
from phase4_scheduler.bench.summary import summarise
from phase4_scheduler.bench.workloads import PromptMaker, Workload, fixed
from phase4_scheduler.tests.sse_peer import MODEL, Peer, serving

ROOT = Path(__file__).parent.parent.parent


def work(count: int, output: int = 4, *, text: bool = False) -> Workload:
    return fixed(count, PromptMaker(0, text=text), prompt=6, output=output)


def load(url: str, workload: Workload, arrival: Arrival, *, warmup=None, observe=None, **target) -> LoadResult:
    """Run it, never longer than a minute."""

    async def bounded() -> LoadResult:
        async with asyncio.timeout(60):
            return await run_load(Target(url, **target), workload, arrival, warmup=warmup, observe=observe)

    return asyncio.run(bounded())


def behaving(**told) -> dict:
    return {"temperature": 0, "peer": told}


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_all_that_is_sent_and_received(endpoint):
    peer = Peer()
    with serving(peer) as url:
        workload = work(5, text=endpoint == CHAT)
        observed = []
        result = load(url, workload, Arrival.closed_loop(2), warmup=work(3, 2, text=True), observe=observed.append,
                      endpoint=endpoint, extra=behaving(pause=0.005))  # fmt: skip
    assert peer.most_open <= 3 and len(peer.seen) == 8  # three to warm up, at most two at a time after that
    asked = peer.seen[3:]
    for body, item in zip(asked, workload.items, strict=True):
        assert body["model"] == MODEL and body["stream"] is True and body["max_tokens"] == 4
        sent = body["messages"][0]["content"] if endpoint == CHAT else body["prompt"]
        assert sent == item.prompt if isinstance(sent, str) else tuple(sent) == item.prompt
    assert len(result.samples) == len(observed) == 5
    for sample in result.samples:
        assert sample.ok and sample.status == 200 and len(sample.times) == 4 and len(sample.gaps) == 3
        assert (sample.prompt_tokens, sample.output_tokens, sample.finish_reason) == (6, 4, "length")
        # The server waits 5 ms before each chunk, by a clock of whole milliseconds: a lower bound on any load.
        assert sample.ttft >= 0.003 and sample.e2e >= 4 * 0.003 and sample.tpot > 0
    assert result.config["server_version"] == "1.2.3" and result.config["warmup"] == 3
    summary = summarise(result)
    assert (summary.completed, summary.failed, summary.output_tokens, summary.short_answers) == (5, 0, 20, 0)
    assert summary.output_rate == pytest.approx(20 / result.duration)


def test_a_closed_loop_keeps_so_many_in_flight_and_no_more():
    peer = Peer()
    with serving(peer) as url:
        result = load(url, work(12, 3), Arrival.closed_loop(4), extra=behaving(pause=0.02))
    assert peer.most_open == 4 and len(result.samples) == 12 and all(s.ok for s in result.samples)


def test_an_open_loop_sends_at_its_times_whatever_the_server_does():
    peer = Peer()
    with serving(peer) as url:
        result = load(url, work(10, 1), Arrival.constant(100), extra=behaving(pause=1.5))
    assert [s.scheduled for s in result.samples] == pytest.approx([i / 100 for i in range(10)])
    assert all(s.sent >= s.scheduled for s in result.samples)
    assert peer.most_open == 10  # none waited for another


def test_merged_chunks_are_counted_by_what_the_server_says():
    with serving(Peer()) as url:
        result = load(url, work(2, 12), Arrival.closed_loop(2), extra=behaving(chunks=4, merge=3))
    summary = summarise(result)
    assert summary.output_tokens == 24 and summary.tokens_per_chunk == 3
    assert all(len(s.times) == 4 for s in result.samples)


@pytest.mark.parametrize(
    ("fault", "error", "status"),
    [
        ("cut", "closed the connection amid the answer", 200),
        ("error", "the engine died", 200),
        ("no done", r"without \[DONE\]", 200),
        ("400", "400: max_tokens is too large", 400),
        ("hang", r"no end after 0\.3 s", 0),
    ],
)
def test_what_goes_wrong_is_counted_and_never_part_of_the_times(fault, error, status):
    peer = Peer()
    with serving(peer) as url:
        result = load(url, work(2, 6), Arrival.closed_loop(1), timeout=0.3 if fault == "hang" else 30.0,
                      extra=behaving(fault=fault))  # fmt: skip
        deadline = time.monotonic() + 20
        while fault == "hang" and peer.disconnected < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert fault != "hang" or peer.disconnected == 2  # a request that is given up is closed, not left to run
    assert len(result.samples) == 2 and not any(s.ok for s in result.samples)
    summary = summarise(result)
    assert summary.failed == 2 and summary.completed == 0 and summary.output_rate == 0 and summary.ttft is None
    ((said, count),) = summary.errors.items()
    assert count == 2
    assert re.search(error, said)
    if fault != "cut":
        assert {s.status for s in result.samples} == {status}


def test_keep_alive_comments_are_no_chunks():
    with serving(Peer()) as url:
        (sample,) = load(url, work(1, 5), Arrival(), extra=behaving(fault="comment")).samples
    assert sample.ok and len(sample.times) == 5


def test_refusals_are_counted_and_with_retries_sent_again_after_the_time_that_the_server_names():
    with serving(Peer(refusals=3, retry_after="0.05")) as url:
        summary = summarise(load(url, work(5), Arrival.closed_loop(1)))
    assert summary.refused == {"429": 3} and (summary.completed, summary.failed) == (2, 3)
    with serving(Peer(refusals=3, retry_after="0.05")) as url:
        result = load(url, work(2), Arrival.closed_loop(1), retries=5)
    first, second = result.samples
    assert first.refusals == [429, 429, 429] and first.ok and second.refusals == []
    assert first.ttft >= 3 * 0.05  # the waiting is part of what a user feels
    assert summarise(result).refused == {"429": 3}


def test_how_long_to_wait_is_the_servers_word_or_twice_as_long_each_time():
    assert seconds_to_wait("2", 1) == 2 and seconds_to_wait("0.25", 4) == 0.25
    assert [seconds_to_wait(None, i) for i in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 30.0]
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT", 1) == 0  # a date that has passed
    assert seconds_to_wait("soon", 2) == 1.0


def test_a_key_is_sent_and_a_missing_one_is_one_line():
    with serving(Peer(key="secret")) as url:
        assert load(url, work(1), Arrival(), api_key="secret").samples[0].ok
        with pytest.raises(UserError, match=r"401 \(no valid key\).*--api-key"):
            load(url, work(1), Arrival())
        (sample,) = load(url, work(1), Arrival(), api_key="wrong", model="named").samples
    assert sample.error == "401: no valid key"


def test_no_server_is_one_line_and_one_that_goes_away_is_a_failed_request():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=r"connection refused.*titan serve"):
            load(url, work(1), Arrival())
        (sample,) = load(url, work(1), Arrival(), model="named").samples
    assert sample.error == "connection refused" and sample.status == 0


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_over_tls_all_of_an_answer_comes_and_an_unknown_certificate_is_one_line(tmp_path, monkeypatch):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    made += " -addext subjectAltName=DNS:localhost"
    subprocess.run([*made.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    with serving(Peer(), ssl_keyfile=key, ssl_certfile=certificate) as url:
        with pytest.raises(UserError, match="certificate verify failed"):
            load(url, work(1), Arrival())
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        result = load(url, work(6, 50), Arrival.closed_loop(3))
    assert [len(sample.times) for sample in result.samples] == [50] * 6 and all(s.ok for s in result.samples)


def test_a_server_that_lists_no_model_is_asked_for_by_name():
    with serving(Peer()) as url, pytest.raises(UserError, match="404 without a model: name one with --model"):
        load(f"{url}/elsewhere", work(1), Arrival())


def test_token_ids_for_a_chat_are_one_line():
    with serving(Peer()) as url, pytest.raises(UserError, match="--text"):
        load(url, work(1), Arrival(), endpoint=CHAT)


def test_stopping_keeps_what_has_ended_and_gives_up_the_rest():
    peer = Peer()

    async def stopped() -> LoadResult:
        stop = asyncio.Event()
        ended = []

        def observe(sample) -> None:
            ended.append(sample)
            if len(ended) == 3:
                stop.set()

        async with asyncio.timeout(60):
            target = Target(url, extra=behaving(pause=0.02))
            return await run_load(target, work(50, 5), Arrival.closed_loop(2), observe=observe, stop=stop)

    with serving(peer) as url:
        result = asyncio.run(stopped())
    summary = summarise(result)
    assert result.interrupted and summary.completed >= 3 and summary.failed >= 1 and len(result.samples) < 50
    assert set(summary.errors) == {"interrupted"}


def test_64_streams_of_a_server_in_another_process_leave_the_client_nearly_idle(tmp_path):
    port = tmp_path / "port"
    command = [sys.executable, "-m", "phase4_scheduler.tests.sse_peer", str(port)]
    peer = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 30
        while not port.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        url = f"http://127.0.0.1:{port.read_text()}"
        result = load(url, work(64, 60), Arrival.closed_loop(64), extra=behaving(pause=0.0125))
    finally:
        peer.terminate()
        peer.wait(10)
    chunks = sum(len(s.times) for s in result.samples)
    assert chunks == 64 * 60 and all(s.ok for s in result.samples)
    print(f"{1e6 * result.cpu_seconds / chunks:.1f} us of CPU a chunk, {chunks / result.duration:,.0f} chunks/s")
    # With the operating system's share and 64 connections being opened: a bound for a loaded machine.
    assert result.cpu_seconds / chunks < 100e-6
