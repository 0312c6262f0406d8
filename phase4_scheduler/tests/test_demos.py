"""The demos, `titan bench` and `titan top` against our own server, started as a user starts it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from phase0_prototype.tests.conftest import one_thread  # noqa: F401  the same fixture here
from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.client import CHAT, Target
from phase4_scheduler.bench.load import run_load
from phase4_scheduler.bench.summary import summarise
from phase4_scheduler.bench.workloads import PromptMaker, mixed
from phase4_scheduler.tests.served import PATIENCE, ROOT, TITAN, environment, served
from phase4_scheduler.top import read_load
from phase4_scheduler.top_frame import Reading

DEMOS = Path(__file__).parent.parent / "demos"
README = (DEMOS / "README.md").read_text(encoding="utf-8")
needs_openai = pytest.mark.skipif(not find_spec("openai"), reason="needs the openai package: pip install openai")


@pytest.fixture(scope="module")
def url():
    with served("titan-tiny", "--dtype", "float32", "--device", "cpu", "--max-num-seqs", "8") as where:
        yield where


@pytest.fixture(scope="module")
def alone() -> Callable[[str], str]:
    """What phase 0's engine, without server or batch, says to a prompt in 24 tokens."""
    from phase0_prototype.llm import LLM
    from phase0_prototype.sampling_params import SamplingParams

    llm = LLM("titan-tiny", dtype="float32", device="cpu", runner="eager", max_model_len=128, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=24)
    return cache(lambda prompt: llm.generate(prompt, params, progress=False)[0].outputs[0].text)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def settled(url: str) -> Reading:
    """The statistics after everything that this test has received.

    The engine sends them now and then, in order with the tokens: the next ones hold all that came before the first.
    """
    deadline, first = time.monotonic() + PATIENCE, read_load(url, timeout=PATIENCE)
    while (load := read_load(url, timeout=PATIENCE))["elapsed_seconds"] <= first["elapsed_seconds"]:
        assert time.monotonic() < deadline, load
        time.sleep(0.02)
    return load


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash")
def test_curl_gets_every_kind_of_answer(url, alone):
    done = run("bash", str(DEMOS / "curl.sh"), url)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = dict(re.findall(r"== ([^\n]*)\n(.*?)(?=\n\n== |\Z)", done.stdout, re.DOTALL))
    named = {title.split(",")[0].split(":")[0]: text.strip() for title, text in parts.items()}
    whole = json.loads(named["a completion"])["choices"][0]["text"]
    assert alone("def add(a, b):").startswith(whole) and len(whole) > 10
    lines = [line.removeprefix("data: ") for line in named["the same"].splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == whole
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 16
    assert len(json.loads(named["two completions with log-probabilities and a seed"])["choices"]) == 2
    assert '"delta"' in named["a chat"] and named["a chat"].endswith("data: [DONE]")
    assert json.loads(named["Anthropic's messages"])["content"][0]["type"] == "text"
    assert json.loads(named["tokens of a text"])["count"] > 2
    assert "temperature" in json.loads(named["a mistake"])["error"]["message"]
    assert "health 200" in named["is it alive"] and "ready 200" in named["is it alive"]
    assert "vllm:generation_tokens_total" in named["metrics for Prometheus"]


@needs_openai
def test_the_openai_package_waits_streams_and_asks_at_once(url, alone):
    import openai

    from phase4_scheduler.demos import client

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as given:
        for prompt in client.PROMPTS:
            assert client.plain(given, "titan-tiny", prompt) == alone(prompt)
        pieces = client.streamed(given, "titan-tiny", client.PROMPTS[0])
        assert len(pieces) > 3
        whole = given.chat.completions.create(
            model="titan-tiny",
            messages=[{"role": "user", "content": client.PROMPTS[0]}],
            max_tokens=24,
            temperature=0,
        )
        assert "".join(pieces) == whole.choices[0].message.content

    async def at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client_:
            return await client.concurrent(client_, "titan-tiny", client.PROMPTS)

    assert asyncio.run(at_once()) == [alone(prompt) for prompt in client.PROMPTS]


@needs_openai
def test_leaving_a_stream_stops_the_servers_work(url):
    import openai

    from phase4_scheduler.demos import client

    async def leave() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client_:
            return await client.cancelled(client_, "titan-tiny", "def add(a, b):")

    before = settled(url)["generated_tokens"]
    assert len(asyncio.run(leave())) == 3
    deadline = time.monotonic() + PATIENCE
    while (load := settled(url))["in_flight"] or load["running"]:
        assert time.monotonic() < deadline, load
    assert 3 <= load["generated_tokens"] - before < 900  # it was told before it had made them all
    assert load["kv_blocks_free"] == load["kv_blocks"]


@needs_openai
def test_the_scripts_and_the_readme_run_as_they_are(url, alone):
    done = run(sys.executable, "-m", "phase4_scheduler.demos.client", url)
    assert done.returncode == 0 and "cancelled after" in done.stdout, done.stderr
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run(sys.executable, "-c", program.replace("http://127.0.0.1:8000", url))
    assert done.stdout.rstrip("\n") == alone("def add(a, b):").rstrip("\n"), done.stderr
    for file in re.findall(r"\]\(([\w./]+)\)", README):
        assert (DEMOS / file).is_file(), file


def test_the_commands_of_the_readme_are_understood(null_url):
    commands = re.findall(r"^titan (bench .*)$", README, re.MULTILINE)
    assert commands
    for command in commands:
        done = run(*TITAN, *command.split(), "--base-url", null_url, "--num-prompts", "2", "--warmup", "1")
        assert done.returncode == 0 and "output tokens/s" in done.stdout, done.stdout + done.stderr
    done = run(*TITAN, "top", "--once", "--url", null_url)
    assert done.returncode == 0 and "null at" in done.stdout and "ready" in done.stdout, done.stderr


@pytest.mark.parametrize("endpoint", ["/v1/completions", CHAT])
def test_a_load_on_the_null_engine_counts_what_the_server_counts(null_url, endpoint):
    workload = mixed(40, PromptMaker(1, text=endpoint == CHAT), short=3, long=12, prompt=20)
    before = settled(null_url)
    target = Target(null_url, endpoint=endpoint, timeout=PATIENCE)
    found = summarise(asyncio.run(run_load(target, workload, Arrival.closed_loop(16))))
    assert (found.completed, found.failed, found.short_answers) == (40, 0, 0), found.errors
    assert found.output_tokens == workload.output_tokens == 20 * 3 + 20 * 12
    after = settled(null_url)
    assert after["generated_tokens"] - before["generated_tokens"] == found.output_tokens
    if endpoint != CHAT:
        assert found.prompt_tokens == 40 * 20


@pytest.fixture(scope="module")
def null_url():
    with served("null", "--settings", json.dumps({"step_seconds": 0.002, "max_num_seqs": 16})) as where:
        yield where
