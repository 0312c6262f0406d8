"""The circuit breaker, with a clock that the test turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phase4_scheduler.core.restarts import Breaker


def breaker(**changes):
    return Breaker(**{"max_restarts": 3, "window": 100.0, "pause": 5.0, "longest_pause": 30.0, **changes})


def test_a_few_deaths_are_answered_at_once_and_too_many_open_it_with_growing_pauses():
    one = breaker()
    assert [one.died(float(t), 0.0) for t in range(8)] == [0, 0, 0, 5, 10, 20, 30, 30]
    assert one.open


def test_deaths_that_are_far_apart_never_open_it():
    one = breaker()
    assert all(one.died(60.0 * t, 55.0) == 0 for t in range(50))


def test_a_process_that_lived_long_enough_closes_it_again():
    one = breaker()
    for t in range(5):
        one.died(float(t), 0.0)
    assert one.open
    assert one.died(200.0, 150.0) == 0.0
    assert not one.open


@given(st.lists(st.tuples(st.floats(0.0, 50.0), st.floats(0.0, 1.0)), min_size=1, max_size=60))
def test_there_are_never_more_starts_at_once_in_a_window_than_allowed(gaps):
    one, now, at_once = breaker(), 0.0, []
    for gap, share in gaps:
        now += gap
        pause = one.died(now, gap * share)
        assert 0 <= pause <= 30
        if pause == 0:
            at_once.append(now)
            assert len([t for t in at_once if now - t < 100]) <= 3
        now += pause
