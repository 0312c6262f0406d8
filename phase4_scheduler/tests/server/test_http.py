"""The routes of a running server: statuses, shapes, keys, headers. The server has no model and one key."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from phase4_scheduler.null_engine import TEXT
from phase4_scheduler.tests.server.conftest import KEY, Server

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PATHS = {
    "/v1/completions": {"prompt": "x", "max_tokens": 4},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream; every event is `data: ...` and an empty line, and the last is [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("data: [DONE]\n\n")
    found = response.text.split("\n\n")
    assert found[-1] == "" and all(event.startswith("data: ") for event in found[:-1])
    return [json.loads(event[6:]) for event in found[:-2]]


@pytest.mark.parametrize("path", PATHS)
def test_every_route_answers(null: httpx.Client, path: str) -> None:
    response = null.post(path, json=PATHS[path])
    assert response.status_code == 200, response.text


def test_every_route_but_three_needs_a_key(null_server: Server, null: httpx.Client) -> None:
    documented = null.get("/openapi.json").json()["paths"]
    assert len(documented) >= 14
    walked = [(path.replace("{model_id}", "null"), m) for path, methods in documented.items() for m in methods]
    walked += [
        ("/openapi.json", "get"),
        ("/docs", "get"),
        ("/nowhere", "get"),
        ("/health/", "get"),
        ("/health/x", "get"),
    ]
    with httpx.Client(base_url=null_server.url, trust_env=False) as stranger:
        opened = set()
        for path, method in walked:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": KEY[:-1]}, {"Authorization": KEY}):
                response = stranger.request(method, path, headers=headers, json={} if method == "post" else None)
                if response.status_code != 401:
                    opened.add(path)
                else:
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert "error" in response.json()
        assert opened == {"/health", "/ready", "/"}
        assert stranger.get("/v1/models", headers={"x-api-key": KEY}).status_code == 200
        assert stranger.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_models_names_and_unknown_ones(null: httpx.Client) -> None:
    listed = null.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["null"]
    assert null.get("/v1/models/null").json() == listed["data"][0]
    for response in (
        null.get("/v1/models/other"),
        null.post("/v1/completions", json={"prompt": "x", "model": "other"}),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
    response = null.post("/v1/messages", json={**CHAT, "model": "other"})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error" and response.json()["type"] == "error"


def test_health_readiness_and_version(null: httpx.Client) -> None:
    assert null.get("/health").json() == {"status": "ready"}
    assert null.get("/ready").json() == {"status": "ready"}
    assert set(null.get("/version").json()) == {"version"}


def test_wrong_methods_and_paths(null: httpx.Client) -> None:
    response = null.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert null.get("/v2").status_code == 404
    assert null.get("/v1/messages").json()["type"] == "error"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
)
def test_other_bodies_than_plain_json_are_415(null: httpx.Client, path: str, headers: dict[str, str]) -> None:
    assert null.post(path, content=b"{}", headers=headers).status_code == 415


def test_usage_is_exact(null: httpx.Client) -> None:
    tokens = null.post("/tokenize", json={"prompt": "def f(x):"}).json()
    answer = null.post("/v1/completions", json={"prompt": "def f(x):", "max_tokens": 7, "n": 2}).json()
    assert answer["usage"] == {
        "prompt_tokens": tokens["count"],
        "completion_tokens": 14,
        "total_tokens": tokens["count"] + 14,
    }
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]


def test_several_prompts_and_sequences_are_choices_in_order(null: httpx.Client) -> None:
    asked = {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 3, "return_token_ids": True}
    answer = null.post("/v1/completions", json=asked).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[5, 6], [5, 6], [7], [7]]
    assert all(len(c["token_ids"]) == 3 for c in answer["choices"])
    streamed: dict[int, list[int]] = {}
    for chunk in events(null.post("/v1/completions", json={**asked, "stream": True})):
        for choice in chunk["choices"]:
            streamed.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert {i: len(ids) for i, ids in streamed.items()} == {0: 3, 1: 3, 2: 3, 3: 3}


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_usage(null: httpx.Client) -> None:
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    found = events(null.post("/v1/chat/completions", json=asked))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in c["choices"][0]["delta"] for c in found[1:-1])
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert [c["choices"][0]["finish_reason"] for c in found[:-1]] == [None] * (len(found) - 2) + ["length"]
    assert len({chunk["id"] for chunk in found}) == 1
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}


def test_continuous_usage_grows_to_the_total(null: httpx.Client) -> None:
    asked = {"prompt": "x", "max_tokens": 5, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(null.post("/v1/completions", json=asked))]
    assert counts == sorted(counts) and counts[-1] == 5


def test_no_usage_unless_asked_for(null: httpx.Client) -> None:
    assert all(
        "usage" not in chunk for chunk in events(null.post("/v1/completions", json={"prompt": "x", "stream": True}))
    )


def test_a_request_id_is_part_of_the_answers_id(null: httpx.Client) -> None:
    asked = {"prompt": "x", "request_id": "abc-1"}
    assert null.post("/v1/completions", json=asked).json()["id"] == "cmpl-abc-1"
    assert null.post("/v1/completions", json=asked).status_code == 200, "an id may come again"


def test_what_is_too_long_says_so(null: httpx.Client) -> None:
    for asked in ({"prompt": [5] * 8192}, {"prompt": [5] * 8000, "max_tokens": 500}, {"prompt": "word " * 9000}):
        response = null.post("/v1/completions", json=asked)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    truncated = null.post("/v1/completions", json={"prompt": "word " * 9000, "truncate_prompt_tokens": 10})
    assert truncated.json()["usage"]["prompt_tokens"] == 10


def test_a_huge_text_is_refused_before_it_is_encoded(null: httpx.Client) -> None:
    began = time.perf_counter()
    response = null.post("/v1/completions", json={"prompt": "a" * 10_000_000})
    assert response.status_code == 400 and "characters" in response.json()["error"]["message"]
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("ids", [[4096], [-1], [10**30], [True], [1.5]])
def test_token_ids_that_are_none(null: httpx.Client, ids: list[Any]) -> None:
    assert null.post("/v1/completions", json={"prompt": ids}).status_code == 400
    assert null.post("/detokenize", json={"tokens": ids}).status_code == 400


def test_a_bomb_of_sequences_is_refused_at_once(null: httpx.Client) -> None:
    """F8."""
    began = time.perf_counter()
    response = null.post("/v1/completions", json={"prompt": "x", "n": 10**9})
    assert response.status_code == 400 and response.json()["error"]["param"] == "n"
    assert time.perf_counter() - began < 2


def test_templates_of_clients_are_refused_and_variables_are_plain(null: httpx.Client) -> None:
    """F11."""
    refused = [
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"messages": "x"}},
        {"chat_template_kwargs": {"bos_token": "x"}},
        {"chat_template_kwargs": {"__class__": "x"}},
        {"chat_template_kwargs": {"x": {"deep": 1}}},
        {"add_generation_prompt": True, "continue_final_message": True},
    ]
    for more in refused:
        assert null.post("/v1/chat/completions", json={**CHAT, **more}).status_code == 400, more
    assert null.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": {"x": 1}}).status_code == 200


def test_special_tokens_in_messages_are_text(null: httpx.Client) -> None:
    """F16. In a raw completion they are special, for the prompt is the caller's own."""
    text = "a<|im_end|>\n<|im_start|>b <|endoftext|><|pad|>"
    raw = null.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert {0, 1, 2, 3} <= set(raw)
    chat = null.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]
    assert not set(chat) & set(range(16))
    assert null.post("/detokenize", json={"tokens": chat}).json()["prompt"] == text


def test_tokenize_and_detokenize_are_inverse(null: httpx.Client) -> None:
    text = "def ünï(): return '你好 👋'"
    found = null.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert null.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert len(found["token_strs"]) == found["count"] == len(found["tokens"])


def test_load_has_what_a_dashboard_reads(null: httpx.Client) -> None:
    from phase4_scheduler.core.wire import Stats

    found = null.get("/load").json()
    wanted = {*Stats().__struct_fields__, "state", "restarts", "in_flight", "qps", "ttft_p50", "ttft_p99", "itl_p50"}
    wanted |= {"itl_p99", "retry_after", "model", "uptime", "server_load", "busy", "batch_occupancy"}
    assert wanted <= set(found)
    assert found["state"] == "ready" and found["model"] == "null"


def test_metrics_reconcile(null: httpx.Client) -> None:
    before = _metrics(null)
    null.post("/v1/completions", json={"prompt": [5] * 11, "max_tokens": 6, "n": 2})
    null.post("/v1/completions", json={"prompt": ["a"] * 3, "max_tokens": 2})
    null.post("/v1/completions", json={"prompt": "a", "max_tokens": -1})
    after = _metrics(null)
    changed = {name: after[name] - before.get(name, 0.0) for name in after}
    assert changed["titan:requests_accepted_total"] == 4
    assert changed["vllm:request_success_total"] == 4
    assert changed["vllm:generation_tokens_total"] == 2 * 6 + 3 * 2
    assert changed["vllm:time_to_first_token_seconds_count"] == 4
    assert changed["vllm:e2e_request_latency_seconds_count"] == 4
    assert after["vllm:kv_cache_usage_perc"] <= 1
    # an answer of six tokens has at most five gaps, and at least one unless all was merged
    assert changed["vllm:inter_token_latency_seconds_count"] <= 2 * 5 + 3 * 1


def _metrics(client: httpx.Client) -> dict[str, float]:
    """Values by name, summed over labels, as `prometheus_client` itself reads them."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_logprobs_of_nothing_are_refused(null: httpx.Client) -> None:
    assert null.post("/v1/completions", json={"prompt": "x", "logprobs": 1}).status_code == 400


def test_no_character_is_split_and_no_stop_string_leaks_whatever_the_tokens_are(null: httpx.Client) -> None:
    """F20, F21. The tokens of the server without a model spell this text for ever, from a place of their own choosing;
    its characters have up to four bytes and several tokens each, and so have the stop strings."""
    for stop in (None, "👋'", "好 👋", "name}", "Hola, {"):
        for stream in (False, True):
            asked = {"prompt": "x", "n": 8, "max_tokens": 60, "stop": stop, "stream": stream, "seed": 3}
            response = null.post("/v1/completions", json=asked)
            texts, reasons = [""] * 8, [""] * 8
            for answer in events(response) if stream else [response.json()]:
                for choice in answer["choices"]:
                    texts[choice["index"]] += choice["text"]
                    reasons[choice["index"]] = choice["finish_reason"]
            assert reasons == ["stop" if stop else "length"] * 8
            for text in texts:
                whole = text.strip("\ufffd")  # it may begin, and without a stop end, within a character
                assert whole in TEXT * 9
                assert stop is None or (stop not in text and (whole + stop in TEXT * 9))
