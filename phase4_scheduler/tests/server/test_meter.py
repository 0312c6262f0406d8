"""Counting: over restarts of the engine, in windows, and each request exactly once."""

from __future__ import annotations

import random

import pytest

from phase4_scheduler.core.wire import Stats
from phase4_scheduler.server.ledger import Ledger
from phase4_scheduler.server.meter import Meter, Newest, percentile
from phase4_scheduler.server.metrics import REASONS, Metrics


def test_rates_are_of_the_last_seconds() -> None:
    meter = Meter()
    for second in range(30):
        tokens = 100 * second if second < 15 else 1500 + 10 * (second - 15)
        stats = Stats(steps=second, generated_tokens=tokens, busy_seconds=second / 2, elapsed_seconds=second)
        meter.sample(float(second), stats, finished=second * 2)
    seen = meter.summary()
    assert seen["generated_tokens_per_second"] == pytest.approx(10)
    assert seen["tokens_per_busy_second"] == pytest.approx(20)
    assert seen["busy"] == pytest.approx(0.5)
    assert seen["qps"] == pytest.approx(2)


def test_a_new_engine_counts_from_zero_and_the_totals_go_on() -> None:
    meter = Meter()
    meter.sample(1.0, Stats(steps=100, generated_tokens=500, elapsed_seconds=9.0), 0)
    meter.sample(2.0, Stats(), 0)  # it died
    meter.sample(3.0, Stats(steps=3, generated_tokens=7, elapsed_seconds=1.0), 0)
    assert meter.totals.generated_tokens == 507
    assert meter.totals.steps == 103


def test_an_idle_server_reports_numbers() -> None:
    meter = Meter()
    assert all(value == 0 for value in meter.summary().values())
    meter.sample(1.0, Stats(), 0)
    meter.sample(2.0, Stats(), 0)
    assert all(value == 0 for value in meter.summary().values())


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(i) for i in range(1, 101)]
    random.Random(0).shuffle(values)
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == 7
    assert percentile([], 0.5) == 0


def test_the_newest_values_are_kept_whatever_came_before() -> None:
    newest = Newest(4)
    for count in range(10):
        assert sorted(newest) == list(range(max(0, count - 4), count)) and len(newest) == min(count, 4)
        newest.append(count)


def test_every_accepted_request_ends_once_and_nothing_is_left() -> None:
    rng = random.Random(1)
    meter = Meter()
    metrics = Metrics("m", meter)
    ledger = Ledger(meter, metrics)
    tickets = [ledger.open(rng.randint(1, 50), rng.randint(1, 4)) for _ in range(200)]
    rng.shuffle(tickets)
    for ticket in tickets:
        for _ in range(rng.randint(0, 5)):
            ticket.took(rng.randint(1, 3), queued=0.001)
        ticket.end(rng.choice(REASONS))
        ticket.end("abort")  # as a stream that closes late does
    assert (ledger.open_prompts, ledger.open_seqs, ledger.prompt_tokens, ledger.generated) == (0, 0, 0, 0)
    assert ledger.backlog_tokens == 0
    text = metrics.render(Stats(), meter.summary(), in_flight=0, backlog=0, restarts=0, state="ready").decode()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    ended = sum(value for name, value in values.items() if name.startswith("vllm:request_success_total"))
    assert ended == 200 == values['titan:requests_accepted_total{engine="0",model_name="m"}']


def test_the_backlog_expects_answers_as_long_as_they_have_been() -> None:
    meter = Meter()
    ledger = Ledger(meter, Metrics("m", meter))
    for _ in range(200):
        ticket = ledger.open(5, 1)
        ticket.took(40, None)
        ticket.end("length")
    ledger.open(10, 2)
    assert ledger.backlog_tokens == pytest.approx(10 + 2 * 40, rel=0.05)
