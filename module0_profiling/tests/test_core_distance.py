"""Samples fall into two groups by what the cores read together; a real sample has sensible figures; plans agree."""

from __future__ import annotations

import pytest

from module0_profiling import core_distance, plans
from module0_profiling.core_distance import Sample, figures
from module0_profiling.device import detect


def test_samples_are_grouped_by_the_number_of_links_and_summarised_by_medians() -> None:
    together = [Sample(30e9, rate * 1e9, 10e-6, 11e-6) for rate in (33, 35, 40)]
    apart = [Sample(30e9, 62e9, 12e-6, us * 1e-6) for us in (16, 17, 20)]
    found = {figure.name: figure for figure in figures([*together, *apart])}
    assert found["cores on one link/samples"].value == found["cores on links of their own/samples"].value == 3
    assert found["cores on one link/read by all cores"].value == pytest.approx(35)
    assert found["cores on one link/read by all cores"].spread == pytest.approx(7 / 35)
    assert found["cores on links of their own/addition, input handed over"].value == pytest.approx(17)
    assert {figure.name.partition("/")[0] for figure in figures(together)} == {"cores on one link"}


def test_a_sample_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_distance, "buffer_bytes", lambda device: 32 << 20)
    monkeypatch.setattr(core_distance, "read_bandwidth_now", lambda device: 2e10)
    taken = core_distance.sample(detect("cpu"))
    assert 1e8 < taken.one < 1e13 and taken.all == 2e10
    assert 0 < taken.kept < 0.1 and 0 < taken.handed < 0.1


def test_the_time_of_what_follows_does_not_include_what_went_before() -> None:
    import time

    seconds = core_distance._after(lambda: time.sleep(0.02), lambda _: None, rounds=5)
    assert seconds < 0.01


def test_plans_are_floors_that_grow_with_the_batch() -> None:
    found = {figure.name: figure.value for figure in plans.figures()}
    rows = {name.partition("/")[0] for name in found}
    assert len(rows) == len(plans.PLANS)
    for row in rows:
        steps = [found[f"{row}/step, batch {batch}"] for batch in plans.BATCHES]
        assert 0 < steps[0] < steps[1] < steps[2]
    bytes_of_8b = 2 * (8_030_261_248 - 128256 * 4096)  # of the embedding, one row is read
    eight = next(row for row in rows if row.startswith("llama3-8b bfloat16, H200"))
    assert found[f"{eight}/step, batch 1"] == pytest.approx(1e3 * (bytes_of_8b + 4096 * 131072) / 4.8e12, rel=0.01)
