"""`titan bench serve | throughput | latency` as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from phase0_prototype import engines
from phase0_prototype.errors import UserError
from phase0_prototype.tests.conftest import one_thread  # noqa: F401  the same fixture here
from phase4_scheduler.bench.commands import register
from phase4_scheduler.bench.offline import measure_latency, measure_throughput
from phase4_scheduler.bench.workloads import PromptMaker, fixed, mixed
from phase4_scheduler.tests.sse_peer import Peer, serving

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def titan():
    """Run `titan` with arguments in this process."""
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)

    def run(*arguments: str):
        return CliRunner(env={"COLUMNS": "140", "TITAN_API_KEY": ""}).invoke(app, [str(a) for a in arguments])

    return run


def test_a_load_is_shown_written_and_drawn(titan, tmp_path):
    peer = Peer()
    out, plot = tmp_path / "load.json", tmp_path / "load"
    with serving(peer) as url:
        done = titan(
            "bench", "serve", "--base-url", f"{url}/v1", "--workload", "mixed", "--num-prompts", 8, "--short", 2,
            "--long", 6, "--input-len", 5, "--max-concurrency", 3, "--warmup", 2, "--slo-ttft", 50, "--slo-itl", 50,
            "--extra-body", '{"seed": 5}', "--out", out, "--plot", plot,
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    for said in ("peer-model", "8 requests, 3 at a time", "output tokens/s", "time to first token", "in time", "p99"):
        assert said in done.output, said
    assert len(peer.seen) == 10
    assert all(b["seed"] == 5 and b["ignore_eos"] is True and len(b["prompt"]) == 5 for b in peer.seen)
    assert not {tuple(b["prompt"]) for b in peer.seen[:2]} & {tuple(b["prompt"]) for b in peer.seen[2:]}
    data = json.loads(out.read_text())
    assert sorted(data["requests"]["output_tokens"]) == [2] * 4 + [6] * 4 and data["config"]["warmup"] == 2
    assert data["summary"]["goodput"] == pytest.approx(data["summary"]["request_rate"])
    assert plot.with_suffix(".svg").exists() and plot.with_suffix(".png").exists()


def test_a_chat_is_asked_with_text_and_the_rate_is_kept(titan):
    peer = Peer()
    with serving(peer) as url:
        done = titan("bench", "serve", "--base-url", url, "--endpoint", "/v1/chat/completions", "--workload", "fixed",
                     "--input-len", 7, "--output-len", 3, "--num-prompts", 5, "--request-rate", 50, "--warmup", 0,
                     "--no-ignore-eos")  # fmt: skip
    assert done.exit_code == 0 and "50 requests/s (Poisson)" in done.output
    assert [len(body["messages"][0]["content"].split()) for body in peer.seen] == [7] * 5
    assert not any("ignore_eos" in body for body in peer.seen)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--workload", "many"), "choose one of mixed"),
        (("serve", "--workload", "absent.jsonl"), "No such file"),
        (("serve", "--request-rate", "0"), "--request-rate"),
        (("serve", "--max-concurrency", "0"), "--max-concurrency"),
        (("serve", "--num-prompts", "0"), "--num-prompts"),
        (("serve", "--endpoint", "/generate"), "/v1/chat/completions"),
        (("serve", "--base-url", "nowhere:x"), "--base-url"),
        (("serve", "--extra-body", "[1]"), "--extra-body"),
        (("serve", "--slo-ttft", "-1"), "--slo-ttft"),
        (("serve", "--retry", "-1"), "--retry"),
        (("throughput", "--workload", "random", "--low", "9", "--high", "3"), "range"),
        (("throughput", "--vocab-size", "3"), "17"),
        (("throughput", "--settings", "no"), "--settings"),
        (("latency", "--vocab-size", "3"), "17"),
    ],
)
def test_a_mistake_is_one_line(titan, arguments, said):
    done = titan("bench", *arguments)
    assert isinstance(done.exception, UserError), done.output
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_when_nothing_is_answered_the_status_is_1(titan):
    with serving(Peer(key="secret")) as url:
        done = titan("bench", "serve", "--base-url", url, "--model", "m", "--num-prompts", 3, "--warmup", 0)
    assert done.exit_code == 1 and "3 x 401: no valid key" in done.output


def test_ctrl_c_keeps_what_has_ended(tmp_path):
    out = tmp_path / "load.json"
    peer = Peer()
    with serving(peer) as url:
        body = json.dumps({"peer": {"pause": 0.02}})
        command = [sys.executable, "-c", "from module0_profiling.cli import main; main()", "bench", "serve",
                   "--base-url", url, "--workload", "fixed", "--output-len", "5", "--num-prompts", "5000",
                   "--max-concurrency", "2", "--warmup", "0", "--extra-body", body, "--out", str(out)]  # fmt: skip
        running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while len(peer.seen) < 6 and time.monotonic() < deadline and running.poll() is None:
                time.sleep(0.01)
            running.send_signal(signal.SIGINT)
            shown, said = running.communicate(timeout=60)
        finally:
            running.kill()
            running.wait(10)
    assert running.returncode == 130, said
    assert "interrupted" in shown and "Traceback" not in said
    data = json.loads(out.read_text())
    ended = [error is None for error in data["requests"]["error"]]
    assert data["summary"]["interrupted"] and ended.count(True) >= 3 and len(ended) < 5000


@pytest.fixture(scope="module")
def llm():
    return engines.llm_of()("titan-tiny", dtype="float32", device="cpu", max_model_len=96, max_num_seqs=4)


def test_throughput_counts_exactly_what_was_asked(llm):
    workload = mixed(6, PromptMaker(0), short=2, long=9, prompt=11)
    found = measure_throughput(llm, workload, warmup=fixed(1, PromptMaker(1), prompt=4, output=2), progress=False)
    assert (found.requests, found.prompt_tokens, found.output_tokens) == (6, 66, 33)
    plain = found.plain()
    assert plain["output_rate"] == pytest.approx(33 / found.duration)
    assert plain["total_rate"] == pytest.approx(99 / found.duration)
    assert 0 < found.ttft.p50 <= found.e2e.p50 <= found.duration and found.e2e.count == 6


def test_latency_times_each_round_and_not_the_warm_up(llm):
    seen = []
    found = measure_latency(llm, PromptMaker(0), batch=2, prompt=5, output=4, rounds=3, warmup=1, observe=seen.append)
    assert len(seen) == 4 and found.seconds == tuple(seen[1:])
    assert found.per_token == found.spread.p50 / 4 and found.plain()["output_rate"] == 2 * 4 / found.spread.p50


def test_a_request_that_does_not_fit_is_one_line(llm):
    with pytest.raises(UserError, match=r"90 tokens and an answer of 7 don't fit max_model_len=96"):
        measure_throughput(llm, fixed(1, PromptMaker(0), prompt=90, output=7))
    with pytest.raises(UserError, match="--iters 0"):
        measure_latency(llm, PromptMaker(0), rounds=0)


def test_offline_commands_show_and_write(titan, tmp_path):
    out = tmp_path / "out.json"
    small = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "64", "--settings", '{"max_num_seqs": 2}')
    done = titan("bench", "throughput", "--workload", "fixed", "--num-prompts", 2, "--input-len", 4, "--output-len", 3,
                 "--out", out, *small)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "output tokens/s" in done.output and "time to first token" in done.output
    data = json.loads(out.read_text())
    assert data["kind"] == "throughput" and data["summary"]["output_tokens"] == 6
    assert data["config"]["engine"]["max_num_seqs"] == 2 and data["config"]["device"] == "cpu"
    done = titan("bench", "latency", "--batch-size", 2, "--input-len", 4, "--output-len", 3, "--iters", 2,
                 "--warmup-iters", 1, "--out", out, *small)  # fmt: skip
    assert done.exit_code == 0 and "a batch" in done.output, done.output
    assert len(json.loads(out.read_text())["summary"]["seconds"]) == 2
