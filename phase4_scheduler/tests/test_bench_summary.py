"""What a load comes to: against numbers worked out by hand or by brute force."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from module0_profiling.plots import digest_of, shows
from phase0_prototype.errors import UserError
from phase4_scheduler.bench import plots, result_file, tables
from phase4_scheduler.bench.samples import LoadResult, Sample
from phase4_scheduler.bench.summary import Slo, Spread, summarise

CONFIG = {"model": "m", "workload": "w", "arrival": "a"}


def sample(sent: float, times: list[float], tokens: int | None = None, **more) -> Sample:
    told = {"ended": times[-1] if times else sent, "status": 200, "prompt_tokens": 10} | more
    return Sample(len(times), sent, sent, times=times, output_tokens=len(times) if tokens is None else tokens, **told)


def result(*samples: Sample, duration: float = 10.0, **more) -> LoadResult:
    return LoadResult(CONFIG, samples, began=1.7e9, duration=duration, cpu_seconds=2.5, **more)


def test_rates_and_times_worked_out_by_hand():
    fast = sample(0.0, [1.0, 1.5, 2.0])  # ttft 1, gaps 0.5
    slow = sample(1.0, [5.0, 9.0])  # ttft 4, gap 4
    failed = sample(2.0, [3.0, 8.0], error="the engine died")
    found = summarise(result(fast, slow, failed))
    assert (found.completed, found.failed, found.errors) == (2, 1, {"the engine died": 1})
    assert (found.prompt_tokens, found.output_tokens) == (20, 5)  # of what came whole
    assert (found.request_rate, found.output_rate, found.total_rate) == (0.2, 0.5, 2.5)
    assert (found.ttft.mean, found.ttft.p50, found.ttft.largest, found.ttft.count) == (2.5, 2.5, 4.0, 2)
    assert found.itl.count == 3 and found.itl.p50 == 0.5 and found.itl.largest == 4.0
    assert found.tpot.mean == pytest.approx((0.5 + 4.0) / 2)
    assert found.e2e.mean == pytest.approx((2.0 + 8.0) / 2)
    assert found.client_busy == 0.25 and found.goodput is None and found.sent_late == 0


def test_goodput_counts_what_came_in_time():
    fast, slow = sample(0.0, [1.0, 1.5, 2.0]), sample(1.0, [5.0, 9.0])
    single = sample(0.0, [0.5])  # one token: there is no further one that could be late
    failed = sample(0.0, [0.1, 0.2], error="cut")
    samples = (fast, slow, single, failed)

    def good(**slo) -> float | None:
        return summarise(result(*samples), Slo(**slo)).goodput

    assert good() is None
    assert good(ttft=1.0) == pytest.approx(0.2) and good(ttft=4.0) == pytest.approx(0.3)
    assert good(itl=0.5) == pytest.approx(0.2) and good(ttft=0.6, itl=0.5) == pytest.approx(0.1)
    with pytest.raises(UserError, match="--slo-itl"):
        Slo(itl=0.0)


def test_refusals_short_answers_and_late_sending_are_said():
    refused = sample(0.0, [], status=429, error="429: too many", refusals=[503, 429])
    again = sample(0.0, [2.0, 3.0], refusals=[503])
    short = Sample(9, 1.0, 1.2, times=[1.5, 1.6], ended=1.6, status=200, output_tokens=2)
    found = summarise(result(refused, again, short, open_loop=True, interrupted=True))
    assert found.refused == {"503": 2, "429": 2} and found.short_answers == 1
    assert found.sent_late == pytest.approx(0.2)
    said = "\n".join(tables.remarks(found))
    for part in ("429: too many", "interrupted", "ignore_eos", "200 ms late"):
        assert part in said
    assert not tables.remarks(summarise(result(again)))


def test_a_busy_client_and_merged_chunks_are_said():
    busy = LoadResult(CONFIG, (sample(0.0, [1.0, 2.0], tokens=6),), 0.0, duration=2.0, cpu_seconds=1.9)
    said = "\n".join(tables.remarks(summarise(busy)))
    assert "95% of a core" in said and "3.0 tokens in a chunk" in said


def test_a_load_of_which_nothing_came_has_no_times():
    found = summarise(LoadResult(CONFIG, (), 0.0, duration=0.0, cpu_seconds=0.0))
    assert found.completed == 0 and found.ttft is None and found.output_rate == 0
    assert tables.of_load(found)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60))
def test_percentiles_lie_between_neighbours(values):
    """Against the definition: the value at place (n - 1) * share of the sorted list, in proportion."""
    ordered = sorted(values)

    def brute(share: float) -> float:
        place = (len(ordered) - 1) * share
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    found = Spread.of(values)
    assert found.p50 == pytest.approx(brute(0.5)) and found.p90 == pytest.approx(brute(0.9))
    assert found.p99 == pytest.approx(brute(0.99)) and found.largest == max(values)


def test_throughput_over_time_holds_every_token_once():
    load = result(sample(0.0, [1.0, 1.5, 9.9], tokens=30), sample(0.0, [5.05]), duration=10.0)
    edges, rates = plots.tokens_over_time(load, bins=100)
    assert len(rates) == 100 and edges[-1] == 10
    assert sum(rates) * 0.1 == pytest.approx(31)
    assert rates[50] * 0.1 == pytest.approx(1) and rates[10] * 0.1 == pytest.approx(10)


def test_pictures_are_drawn_and_the_file_holds_every_request(tmp_path):
    load = result(sample(0.0, [1.0, 1.5, 9.9]), sample(0.25, [5.0]), sample(0.5, [], error="refused", status=0))
    svg, png = plots.draw(load, tmp_path / "load")
    assert shows(svg, digest_of(load.columns()))
    assert png.read_bytes()[:4] == b"\x89PNG"
    parts = {"config": load.config, "summary": summarise(load).plain(), "requests": load.columns()}
    data = json.loads(result_file.write(tmp_path / "a" / "load.json", "serve", parts, load.began).read_text())
    assert data["kind"] == "serve" and data["date"] == "2023-11-14T22:13:20Z" and data["versions"]["python"]
    assert data["machine"]["cpu"]["name"] and data["summary"]["completed"] == 2
    requests = data["requests"]
    assert requests["ttft"] == [1.0, 4.75, None] and requests["itl"] == [[0.5, 8.4], [], []]
    assert requests["sent"] == [0, 0.25, 0.5] and requests["error"] == [None, None, "refused"]
    assert all(len(column) == 3 for column in requests.values())


def test_nothing_to_draw_and_nowhere_to_write_are_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        plots.draw(result(sample(0.0, [], error="x")), tmp_path / "load")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        result_file.write(tmp_path / "file" / "load.json", "serve", {}, 0.0)
    with pytest.raises(UserError, match="--plot"):
        plots.draw(result(sample(0.0, [1.0, 2.0])), tmp_path / "file" / "load")
