"""From bytes to `SamplingParams`: what is let through, what is refused, and how it is told. No server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core import wire
from phase4_scheduler.server import neutral
from phase4_scheduler.server.body import decode
from phase4_scheduler.server.chat_protocol import ChatRequest, chat_params, plain_messages
from phase4_scheduler.server.completion_protocol import CompletionRequest, completion_params, prompts_of
from phase4_scheduler.server.errors import ApiError, body_of
from phase4_scheduler.server.fields import Generating
from phase4_scheduler.server.messages_protocol import CountRequest, chat_of
from phase4_scheduler.server.options import ServerOptions

OPTIONS = ServerOptions()
INFO = wire.Info("m", 256, 4096, [0], 8, 64, 128, 16, "float32", "cpu")


def completion(**fields: Any) -> CompletionRequest:
    return decode(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest, neutral.COMPLETION)


def params(**fields: Any) -> SamplingParams:
    return completion_params(completion(**fields), OPTIONS, INFO)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as found:
        params(**fields)
    assert found.value.status == 400
    assert "\n" not in found.value.message
    return found.value


def test_every_sampling_parameter_reaches_the_engine_under_its_name() -> None:
    wanted = {
        "n": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "seed": 11,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "logprobs": 4,
        "prompt_logprobs": 2,
    }
    assert params(**wanted) == SamplingParams(**wanted)
    assert set(wanted) == {f.name for f in dataclasses.fields(SamplingParams)}, "one is not tested"


def test_null_means_the_default() -> None:
    fields = {f.name: None for f in msgspec.structs.fields(Generating)}
    assert params(**fields) == SamplingParams()


def test_what_a_request_does_not_say_is_the_checkpoints() -> None:
    info = msgspec.structs.replace(INFO, sampling_defaults={"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    asked = completion(top_p=0.5)
    assert completion_params(asked, OPTIONS, info) == SamplingParams(temperature=0.6, top_p=0.5, top_k=20)
    plain = ServerOptions(generation_config="vllm")
    assert completion_params(asked, plain, info) == SamplingParams(top_p=0.5)


def test_a_chat_answer_may_fill_the_context_and_a_completion_has_sixteen_tokens() -> None:
    asked = decode(b'{"messages": [{"role": "user", "content": "x"}]}', ChatRequest, neutral.CHAT)
    assert chat_params(asked, OPTIONS, INFO).max_tokens is None
    assert params().max_tokens == 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**30}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 0, "n": 2}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [str(i) for i in range(17)]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ({"priority": 1}, "priority"),
        ({"request_id": "a b\n"}, "request_id"),
        ({"timeout": 0}, "timeout"),
        ({"max_tokenz": 5}, "max_tokenz"),
        ({"guided_json": {}}, "guided_json"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"store": True}, "store"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_the_field(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert error.param == param or (error.param or "").startswith(param)
    assert param in error.message


@pytest.mark.parametrize("allowed", [neutral.COMPLETION, neutral.CHAT, neutral.MESSAGES])
def test_a_neutral_value_passes_and_any_other_does_not(allowed: dict[str, Any]) -> None:
    for name, values in allowed.items():
        if isinstance(values, neutral.AnyOf):
            continue
        for value in values:
            assert neutral.strip({name: value}, allowed) == {}
        with pytest.raises(ApiError, match=name):
            neutral.strip({name: {"something": "that asks"}}, allowed)


def test_an_unknown_field_comes_with_the_nearest_that_is_known() -> None:
    assert "did you mean max_tokens?" in refused(max_tokenz=1).message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"prompt": "x"} y',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": {}}',
        b'{"max_tokens": 1}',
        b'{"prompt": ' + b"[" * 200_000,
        b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_broken_bodies_are_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as found:
        decode(body, CompletionRequest, neutral.COMPLETION)
    assert found.value.status == 400


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=8)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200, deadline=None)
def test_no_body_raises_anything_else(body: bytes) -> None:
    with pytest.raises(ApiError):
        decode(body, CompletionRequest, neutral.COMPLETION)


def test_prompts_come_in_four_shapes() -> None:
    assert prompts_of(completion(prompt="a"), 9) == ["a"]
    assert prompts_of(completion(prompt=["a", "b"]), 9) == ["a", "b"]
    assert prompts_of(completion(prompt=[1, 2]), 9) == [[1, 2]]
    assert prompts_of(completion(prompt=[[1], [2, 3]]), 9) == [[1], [2, 3]]
    for wrong in ([], ["a", 1], [[1], "a"], ["a"] * 10, [1, [2]]):
        with pytest.raises(ApiError) as found:
            prompts_of(completion(prompt=wrong), 9)
        assert found.value.param == "prompt"


def test_messages_become_role_and_text() -> None:
    given_messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "kim"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
    ]
    assert plain_messages(given_messages) == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "a\nb", "name": "kim"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["x"]},
        {"role": "tool", "content": "x"},
        {"role": ["user"], "content": "x"},
        {"role": "user", "content": "x", "weight": 1},
        {"role": "user", "content": "x", "name": 1},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
    ],
)
def test_messages_that_need_more_than_text_are_a_400_that_says_where(message: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=r"messages\[0\]") as found:
        plain_messages([message])
    assert found.value.status == 400


def test_anthropic_messages_have_a_system_of_their_own() -> None:
    asked = decode(
        b'{"system": [{"type": "text", "text": "be short"}], "messages": [{"role": "user", "content": "hi"}]}',
        CountRequest,
        neutral.MESSAGES,
    )
    assert chat_of(asked) == [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]


def test_errors_have_the_shape_of_their_dialect() -> None:
    error = ApiError(429, "full", code="rate_limit_exceeded")
    assert body_of(error) == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    }
    assert body_of(error, anthropic=True) == {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}}
    assert body_of(ApiError(503, "x"), anthropic=True)["error"]["type"] == "overloaded_error"
