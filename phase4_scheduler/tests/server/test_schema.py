"""schemathesis against our OpenAPI document, with requests that follow it and requests that don't."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from phase4_scheduler.tests.server.conftest import KEY, PATIENCE, Server

schemathesis = pytest.importorskip("schemathesis")
HEADERS = {"Authorization": f"Bearer {KEY}"}
COUNTS = {"positive": 12, "negative": 12}


@pytest.fixture(scope="module")
def document(null_server: Server) -> Any:
    """The document, as clients get it."""
    return httpx.get(f"{null_server.url}/openapi.json", headers=HEADERS, trust_env=False).json()


@pytest.fixture(scope="module")
def schema(document: Any, null_server: Server) -> Any:
    """schemathesis' view of it."""
    found = schemathesis.openapi.from_dict(document)
    found.config.update(base_url=null_server.url)
    return found


def ask_all(operation: Any, mode: str) -> set[int]:
    """Ask for an operation in many ways, check each answer, and return the statuses."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    statuses: set[int] = set()

    def ask(case: Any) -> None:
        response = case.call(headers=HEADERS, timeout=PATIENCE)
        statuses.add(response.status_code)
        case.validate_response(
            response,
            headers=HEADERS,
            checks=(not_a_server_error, status_code_conformance, response_schema_conformance),
        )

    strategy = operation.as_strategy(generation_mode=getattr(schemathesis.GenerationMode, mode.upper()))
    limited = settings(
        max_examples=COUNTS[mode],
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    limited(given(case=strategy)(ask))()
    return statuses


def test_every_request_by_the_document_has_a_documented_answer(schema: Any) -> None:
    for operation in operations(schema):
        ask_all(operation, "positive")


def test_requests_against_the_document_are_refused_and_none_is_a_500(schema: Any) -> None:
    asked = {o.label: ask_all(o, "negative") for o in operations(schema) if o.body}
    assert len(asked) == 6
    assert all(statuses <= {400, 404, 415} for statuses in asked.values()), asked


def operations(schema: Any) -> Iterator[Any]:
    """Those of the document; one that can't be read fails here."""
    for found in schema.get_all_operations():
        yield found.ok()


def test_the_document_is_complete(document: Any) -> None:
    """Every field of a request has its place, those too that are refused unless they ask for nothing."""
    found = document["components"]["schemas"]
    assert {"prompt", "top_k", "guided_json", "logit_bias"} <= set(found["CompletionRequest"]["properties"])
    assert {"messages", "tools", "max_completion_tokens"} <= set(found["ChatRequest"]["properties"])
    assert found["ChatRequest"]["additionalProperties"] is False
    for methods in document["paths"].values():
        for described in methods.values():
            for status, answer in described["responses"].items():
                if int(status) >= 400:
                    reference = answer["content"]["application/json"]["schema"]["$ref"]
                    assert reference.rpartition("/")[2] in ("Error", "AnthropicError")
