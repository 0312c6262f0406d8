"""The bounded queue, as pure logic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from module0_profiling.course.parts import Use, resolve

IDLE = {
    "open_seqs": 0,
    "waiting_seqs": 0,
    "max_num_seqs": 8,
    "prompt_tokens": 0,
    "backlog_tokens": 0.0,
    "tokens_per_second": 0.0,
}


@pytest.fixture(scope="module")
def admission(use: str) -> Any:
    """The part under test."""
    return resolve("phase4_scheduler", "server.admission", Use.parse(use))


def load(admission: Any, **given: Any) -> Any:
    return admission.Load(**{**IDLE, **given})


def test_without_bounds_everybody_is_let_in(admission: Any) -> None:
    busy = load(admission, open_seqs=10**6, waiting_seqs=10**6, prompt_tokens=10**9)
    assert admission.Admission().refusal(busy, 128, 10**6) is None


def test_places_in_the_batch_are_no_queue(admission: Any) -> None:
    door = admission.Admission(max_num_queued_reqs=2)
    assert door.refusal(load(admission, open_seqs=7), 1, 10) is None
    assert door.refusal(load(admission, open_seqs=9), 1, 10) is None  # the second that waits
    refusal = door.refusal(load(admission, open_seqs=10), 1, 10)
    assert refusal.reason == "queued_reqs"


def test_what_waits_for_memory_counts_though_the_batch_has_places(admission: Any) -> None:
    door = admission.Admission(max_num_queued_reqs=2)
    waiting = load(admission, open_seqs=4, waiting_seqs=3)
    assert waiting.queued_seqs == 3
    assert door.refusal(waiting, 1, 10).reason == "queued_reqs"


def test_nobody_waits_where_nobody_may(admission: Any) -> None:
    door = admission.Admission(max_num_queued_reqs=0)
    assert door.refusal(load(admission, open_seqs=7), 1, 10) is None
    assert door.refusal(load(admission, open_seqs=8), 1, 10).reason == "queued_reqs"


def test_a_request_larger_than_the_queue_is_let_in_when_nothing_waits(admission: Any) -> None:
    door = admission.Admission(max_num_queued_reqs=2, max_num_queued_tokens=100)
    assert door.refusal(load(admission), 64, 10_000) is None


def test_prompt_tokens_have_a_bound_of_their_own(admission: Any) -> None:
    door = admission.Admission(max_num_queued_tokens=1000)
    assert door.refusal(load(admission, prompt_tokens=900), 1, 100) is None
    assert door.refusal(load(admission, prompt_tokens=900), 1, 101).reason == "queued_tokens"


def test_retry_after_is_the_backlog_over_the_speed(admission: Any) -> None:
    busy = load(admission, open_seqs=99, waiting_seqs=91, backlog_tokens=3000.0, tokens_per_second=100.0)
    assert admission.retry_after(busy) == pytest.approx(30.0)
    refusal = admission.Admission(max_num_queued_reqs=2).refusal(busy, 1, 1)
    assert refusal.retry_after == pytest.approx(30.0)
    assert "30 s" in refusal.message


@given(
    backlog=st.floats(0, 1e12),
    speed=st.floats(0, 1e9),
    queue=st.integers(0, 100),
    bound=st.integers(1, 100),
    seqs=st.integers(1, 100),
)
def test_the_queue_never_grows_past_its_bound_once_something_waits(
    use: str, backlog: float, speed: float, queue: int, bound: int, seqs: int
) -> None:
    part: Any = resolve("phase4_scheduler", "server.admission", Use.parse(use))
    now = part.Load(8 + queue, queue, 8, 0, backlog, speed)
    refusal = part.Admission(max_num_queued_reqs=bound).refusal(now, seqs, 1)
    if refusal is None:
        assert queue == 0 or queue + seqs <= bound
    else:
        assert 1 <= refusal.retry_after <= 120
    assert replace(now, open_seqs=0, waiting_seqs=0).queued_seqs == 0
