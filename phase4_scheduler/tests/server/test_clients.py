"""The real `openai` and `anthropic` packages against the shipped model: every answer is that of the offline engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from phase0_prototype.llm import LLM
from phase0_prototype.outputs import CompletionOutput
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.tests.server.conftest import PATIENCE, Server

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

PROMPTS = ["def binary_search(", "class Queue:\n    ", "import os\n", "# héllo 你好 👋\nx = '", "for i in range("]
MODEL = "titan-tiny"


@pytest.fixture(scope="module")
def offline() -> Iterator[LLM]:
    """The engine of phase 0 in float32: the oracle. One thread, as the server has: both sum in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LLM(MODEL, use="phase0=solution", dtype="float32", device="cpu")
    torch.set_num_threads(threads)


def expected(offline: LLM, prompt: str, **params: Any) -> CompletionOutput:
    return offline.generate(prompt, SamplingParams(**params), progress=False)[0].outputs[0]


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> Iterator[Any]:
    """OpenAI's."""
    http = httpx.Client(trust_env=False)
    with openai.OpenAI(
        base_url=f"{tiny_server.url}/v1", api_key="none", timeout=PATIENCE, http_client=http, max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="module")
def claude(tiny_server: Server) -> Iterator[Any]:
    """Anthropic's."""
    with anthropic.Anthropic(base_url=tiny_server.url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions_equal_the_offline_engine(client: Any, offline: LLM, prompt: str) -> None:
    wanted = expected(offline, prompt, temperature=0, max_tokens=24)
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24)
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    assert answer.usage.completion_tokens == len(wanted.token_ids)


def test_all_at_once_streaming_equals_one_at_a_time(tiny_server: Server, offline: LLM) -> None:
    async def one(client: Any, prompt: str) -> str:
        text = ""
        stream = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].text
            else:
                assert chunk.usage.completion_tokens <= 24
        return text

    async def work() -> list[str]:
        http = httpx.AsyncClient(trust_env=False)
        url = f"{tiny_server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=PATIENCE, http_client=http) as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in PROMPTS * 3)))

    wanted = [expected(offline, prompt, temperature=0, max_tokens=24).text for prompt in PROMPTS]
    assert asyncio.run(work()) == wanted * 3


def test_chat_continues_the_messages_and_streams_the_same(client: Any, offline: LLM) -> None:
    messages = [{"role": "system", "content": "# tools"}, {"role": "user", "content": "def add(a, b):"}]
    wanted = expected(offline, "# tools\ndef add(a, b):", temperature=0, max_tokens=24)
    asked = {"model": MODEL, "messages": messages, "temperature": 0, "max_completion_tokens": 24}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == wanted.text
    streamed = list(client.chat.completions.create(**asked, stream=True))
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == wanted.text
    assert streamed[-1].choices[0].finish_reason == wanted.finish_reason


def test_logprobs_of_completions_and_chat(client: Any, offline: LLM) -> None:
    wanted = expected(offline, PROMPTS[0], temperature=0, max_tokens=8, logprobs=3)
    assert wanted.logprobs is not None
    chosen = [at[i].logprob for i, at in zip(wanted.token_ids, wanted.logprobs, strict=True)]
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    found = client.completions.create(**asked, prompt=PROMPTS[0], logprobs=3).choices[0]
    assert found.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-3)
    assert "".join(found.logprobs.tokens) == found.text
    assert [
        found.text[o : o + len(t)] for o, t in zip(found.logprobs.text_offset, found.logprobs.tokens, strict=True)
    ] == (found.logprobs.tokens)
    for at, top in zip(wanted.logprobs, found.logprobs.top_logprobs, strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(c.logprob for c in at.values()), abs=1e-3)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    content = (
        client.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=3).choices[0].logprobs
    )
    assert [one.logprob for one in content.content] == pytest.approx(chosen, abs=1e-3)
    for one in content.content:
        values = [top.logprob for top in one.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert one.token == bytes(one.bytes).decode()
        assert one.logprob == pytest.approx(values[0], abs=1e-3), "greedy takes the most likely"
    streamed = client.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=3, stream=True)
    flat = [one for c in streamed if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert [one.token for one in flat] == [one.token for one in content.content]
    assert [one.logprob for one in flat] == pytest.approx(chosen, abs=1e-3)


def test_echo_with_logprobs_scores_a_text_as_lm_eval_does(client: Any, offline: LLM) -> None:
    """`lm_eval --model local-completions` sends token ids, echo, logprobs=1, max_tokens=1 and reads these fields."""
    text = "def add(a, b):\n    return a + b\n"
    output = offline.generate(text, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1), progress=False)[0]
    ids, positions = output.prompt_token_ids, output.prompt_logprobs
    assert positions is not None
    wanted = [at[i].logprob for i, at in zip(ids[1:], positions[1:], strict=True) if at]
    for most in (1, 0):
        asked = {"model": MODEL, "temperature": 0, "max_tokens": most, "logprobs": 1, "echo": True, "seed": 1}
        answer = client.completions.create(prompt=[ids, ids[:5]], **asked)
        first = answer.choices[0]
        assert first.text.startswith(text)
        assert first.logprobs.token_logprobs[0] is None and first.logprobs.top_logprobs[0] is None
        assert first.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-3)
        assert len(first.logprobs.tokens) == len(ids) + most
        assert "".join(first.logprobs.tokens) == first.text
        assert all(math.isfinite(v) for top in first.logprobs.top_logprobs[1:] for v in top.values())
        assert answer.usage.completion_tokens == 2 * most
        stream = list(client.completions.create(prompt=[ids], stream=True, **asked))
        assert "".join(c.choices[0].text for c in stream) == first.text
        told = [v for c in stream for v in c.choices[0].logprobs.token_logprobs]
        assert told[1:] == pytest.approx(first.logprobs.token_logprobs[1:], abs=1e-3)


def test_prompt_logprobs_are_vllms(client: Any, offline: LLM) -> None:
    output = offline.generate("x = 1", SamplingParams(max_tokens=1, prompt_logprobs=2), progress=False)[0]
    answer = client.completions.create(
        model=MODEL, prompt="x = 1", max_tokens=1, extra_body={"prompt_logprobs": 2, "return_token_ids": True}
    )
    found = answer.choices[0].prompt_logprobs
    assert answer.choices[0].prompt_token_ids == output.prompt_token_ids
    assert found[0] is None and len(found) == len(output.prompt_token_ids)
    for told, at in zip(found[1:], output.prompt_logprobs[1:] if output.prompt_logprobs else [], strict=True):
        assert at is not None and set(told) == {str(i) for i in at}


def test_several_sequences_are_those_of_one_seed(client: Any) -> None:
    asked = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 1.0, "n": 3}
    first, again, other = (client.completions.create(**asked, seed=seed) for seed in (5, 5, 6))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.text for choice in again.choices] == texts
    assert [choice.text for choice in other.choices] != texts
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_stop_strings_end_the_text_before_them(client: Any, offline: LLM) -> None:
    free = expected(offline, PROMPTS[0], temperature=0, max_tokens=30).text
    for stop in {free[k : k + 3] for k in range(4, 30, 8)}:
        asked = {"model": MODEL, "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 30, "stop": [stop]}
        whole = client.completions.create(**asked).choices[0]
        assert whole.text == free[: free.index(stop)]
        assert whole.finish_reason == "stop" and whole.stop_reason == stop
        streamed = [c.choices[0].text for c in client.completions.create(**asked, stream=True)]
        assert "".join(streamed) == whole.text
        kept = client.completions.create(**asked, extra_body={"include_stop_str_in_output": True})
        assert kept.choices[0].text == whole.text + stop


def test_sampled_text_is_the_same_streamed_and_whole(client: Any) -> None:
    """F20: at a high temperature the model writes broken and unusual characters."""
    for seed in range(4):
        asked = {"model": MODEL, "prompt": PROMPTS[3], "max_tokens": 30, "temperature": 2.0, "seed": seed}
        whole = client.completions.create(**asked).choices[0].text
        assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True)) == whole


def test_errors_are_the_packages_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert bad.value.param == "tools" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_anthropic_messages(claude: Any, offline: LLM) -> None:
    asked = {
        "model": MODEL,
        "system": "# tools",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "def add(a, b):"}]}],
        "max_tokens": 24,
        "extra_body": {"temperature": 0},
    }
    wanted = expected(offline, "# tools\ndef add(a, b):", temperature=0, max_tokens=24)
    answer = claude.messages.create(**asked)
    assert answer.content[0].text == wanted.text
    assert answer.stop_reason == ("end_turn" if wanted.finish_reason == "stop" else "max_tokens")
    assert answer.usage.output_tokens == len(wanted.token_ids)
    counted = claude.messages.count_tokens(**{n: asked[n] for n in ("model", "system", "messages")})
    assert counted.input_tokens == answer.usage.input_tokens
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == wanted.text
        final = stream.get_final_message()
    assert final.usage.output_tokens == len(wanted.token_ids)
    stop = wanted.text[6:9]
    stopped = claude.messages.create(**asked, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == wanted.text[: wanted.text.index(stop)]


def test_anthropic_continues_a_message_of_the_assistant(claude: Any, offline: LLM) -> None:
    messages = [{"role": "user", "content": "# add"}, {"role": "assistant", "content": "def add(a, b):"}]
    wanted = expected(offline, "# add\ndef add(a, b):", temperature=0, max_tokens=8)
    answer = claude.messages.create(model=MODEL, messages=messages, max_tokens=8, extra_body={"temperature": 0})
    assert answer.content[0].text == wanted.text


def test_anthropic_errors_are_the_packages_own(claude: Any) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(anthropic.BadRequestError) as bad:
        claude.messages.create(model=MODEL, messages=messages, max_tokens=5, tools=[{"name": "f", "input_schema": {}}])
    assert bad.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", messages=messages, max_tokens=5)
