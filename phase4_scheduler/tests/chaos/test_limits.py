"""What has an end: memory, descriptors, patience with clients. And many streams at once."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest

from phase4_scheduler.measures.chaos import storm
from phase4_scheduler.measures.chaos_oracle import of_null
from phase4_scheduler.measures.chaos_plan import asks
from phase4_scheduler.measures.chaos_server import Victim, is_gone, kill, wait
from phase4_scheduler.tests.chaos.conftest import NULL, OPTIONS, TINY
from phase4_scheduler.tests.chaos.test_processes import post, read

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
STREAMS = 500
MIB = 1 << 20


def peak(process: psutil.Process) -> int:
    """Most bytes of memory that a process ever had."""
    with open(f"/proc/{process.pid}/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def fast() -> Iterator[Victim]:
    """Steps of no time, room for everybody, and long answers."""
    settings = {"step_seconds": 0.0, "max_num_seqs": 512, "max_model_len": 1 << 16, "num_blocks": 1 << 15}
    with Victim("null", settings, OPTIONS) as victim:
        yield victim.wait_ready()


def test_f23_five_hundred_streams_at_once_and_nobody_is_turned_away(fast: Victim) -> None:
    report = storm(fast, asks(STREAMS, 23, longest=20, calm=True), of_null(), concurrency=STREAMS)
    assert report.faults == []
    assert all((outcome.status, outcome.attempts) == (200, 1) for outcome in report.outcomes)
    assert report.books["accepted"] == STREAMS == report.books["length"]


@LINUX
def test_slow_readers_cost_no_more_than_their_answers(fast: Victim) -> None:
    """Clients that ask for 20,000 tokens each and read nothing: what sockets don't take is merged and waits."""
    api = psutil.Process(fast.process.pid)
    before, readers, tokens = peak(api), 10, 20_000
    made = fast.load()["generated_tokens"] + readers * tokens
    with ExitStack() as stack:
        for _ in range(readers):
            stack.enter_context(post(fast, max_tokens=tokens, stream=True, return_token_ids=True))
        wait(lambda: fast.load()["generated_tokens"] >= made, "the engine waits for its readers")
        assert read(post(fast, max_tokens=3)).startswith(b"HTTP/1.1 200"), "others are served"
        # bytes: of each token a number, places in two lists, letters of up to four bytes in three texts, and room
        assert peak(api) - before < readers * (tokens * 300 + MIB)
    wait(lambda: not fast.load()["in_flight"], "they were not let go")


@LINUX
def test_f10_a_hundred_megabytes_are_not_kept(null: Victim) -> None:
    api = psutil.Process(null.process.pid)
    before = peak(api)
    route = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"100000\r\n" + b"x" * MIB + b"\r\n"
    for head, piece in (
        (route + b"Content-Length: 104857600\r\n\r\n", b"x" * MIB),
        (route + b"Transfer-Encoding: chunked\r\n\r\n", chunk),
        (route + b"X-A: ", b"a" * MIB),
    ):
        with socket.create_connection(("127.0.0.1", int(null.url.rpartition(":")[2])), timeout=60) as sock:
            with suppress(OSError):  # it hung up
                sock.sendall(head)
                for _ in range(100):
                    sock.sendall(piece)
            with suppress(OSError):
                answer = sock.recv(1000)
                assert answer.split()[1] in (b"413", b"431"), answer
    assert peak(api) - before < 64 * MIB
    assert null.get("/health")[0] == 200


def test_without_descriptors_nobody_is_served_and_afterwards_everybody() -> None:
    """Idle connections take all of 80 descriptors. An engine that dies just then is replaced as soon as it can be."""
    with Victim("null", NULL, OPTIONS, limits="-n 80") as victim:
        victim.wait_ready()
        engine = victim.engine()
        assert engine is not None
        api = psutil.Process(victim.process.pid)
        address = ("127.0.0.1", int(victim.url.rpartition(":")[2]))
        with ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(socket.create_connection(address, timeout=60))
            wait(lambda: api.num_fds() >= 78, "there are descriptors left")
            kill(engine)
            wait(lambda: is_gone(engine), "it is not gone")
        wait(lambda: victim.load()["restarts"] > 0 and victim.get("/ready")[0] == 200, "it does not come back")
        assert read(post(victim, max_tokens=3)).startswith(b"HTTP/1.1 200")
        assert victim.end() == 0


@LINUX
def test_a_server_takes_as_many_descriptors_as_it_may_have() -> None:
    """Shells give 1,024 of them, and each stream takes one."""
    with Victim("null", NULL, OPTIONS, limits="-S -n 100") as victim:
        soft, hard = psutil.Process(victim.wait_ready().process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == min(hard, 65_536) > 100


@LINUX
def test_f09_log_probabilities_of_whole_contexts_are_bounded_in_memory(tiny: Victim) -> None:
    """As many as a request may ask for, of every token of the longest prompts, eight of them at once."""
    family = tiny.family()
    length = TINY["max_model_len"] - 4
    alone = json.loads(read(post(tiny, prompt=[5] * 20, max_tokens=8, temperature=0)).partition(b"\r\n\r\n")[2])
    before = [peak(process) for process in family]
    asked = {"prompt": [20 + i % 4000 for i in range(length)], "max_tokens": 4, "logprobs": 20, "prompt_logprobs": 20}
    large = [post(tiny, **asked) for _ in range(8)]
    small = json.loads(read(post(tiny, prompt=[5] * 20, max_tokens=8, temperature=0)).partition(b"\r\n\r\n")[2])
    assert small["choices"][0]["text"] == alone["choices"][0]["text"]
    for sock in large:
        answer = read(sock)
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        told = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["prompt_logprobs"]
        assert len(told) == length and all(len(one) >= 20 for one in told[1:])
    grown = [peak(process) - peaked for process, peaked in zip(family, before, strict=True)]
    assert max(grown) < 256 * MIB, grown
    wait(lambda: tiny.load()["kv_blocks_free"] == tiny.load()["kv_blocks"], "blocks are lost")
