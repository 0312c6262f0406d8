"""The overhead of the engine, and the comparison of predicted with measured steps: they run on the real engine."""

from __future__ import annotations

import pytest
from rich.console import Console

from module0_profiling import calibration
from module0_profiling.device import detect
from module0_profiling.predict import Prediction
from phase0_prototype import overhead, predict_check, workloads


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions: whether the figures are near each other is for the recorded run to say."""
    monkeypatch.setattr(calibration, "SECONDS", 0.001)
    monkeypatch.setattr(overhead, "ROUNDS", 1)
    monkeypatch.setattr(predict_check, "REPEATS", 1)
    monkeypatch.setattr(predict_check, "NEW_TOKENS", {workloads.TINY: 4})
    monkeypatch.setattr(predict_check, "read_bandwidth_now", lambda device: 1e9)


def test_the_overhead_is_what_is_left_of_a_step_without_work() -> None:
    cpu = detect("cpu")
    found = overhead.measure(cpu, calibration.calibrate(cpu))
    assert found.layer >= 0 and found.sequence >= 0
    assert found.of(8, 1) < 1  # seconds


def test_a_check_has_each_case_once_a_round_and_its_errors_are_of_the_same_round() -> None:
    found = predict_check.check({workloads.TINY: workloads.TINY}, 2, Console(quiet=True))
    assert [each.case.label for each in found] == [
        "titan-tiny, prefill of 128",
        "titan-tiny, decode, batch 1",
        "titan-tiny, decode, batch 8",
    ]
    for each in found:
        assert len(each.predictions) == len(each.measured) == len(each.bandwidth) == 2
        assert min(each.measured) > 0
    names = [figure.name for figure in predict_check.figures(found)]
    assert "titan-tiny, decode, batch 8/error" in names and "memory/slowest round" in names


def test_errors_are_relative_to_what_was_measured() -> None:
    def took(seconds: float) -> Prediction:
        return Prediction(1, 1, 128, (), 0.0, seconds, 0.0, 0.0)

    case = predict_check.Case("m", 1)
    checked = predict_check.Checked(case, (took(2.0), took(3.0), took(4.0)), (1.0, 4.0, 4.0), (1e9,) * 3)
    assert checked.errors == (1.0, -0.25, 0.0) and checked.error == 0.0


def test_a_turn_is_repeated_when_the_memory_changed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([10e9, 20e9, 20e9, 21e9])
    monkeypatch.setattr(predict_check, "read_bandwidth_now", lambda device: next(rates))
    monkeypatch.setattr(predict_check, "calibrate", lambda *a: None)
    monkeypatch.setattr(overhead, "measure", lambda *a: None)
    monkeypatch.setattr(predict_check, "predicted", lambda *a: None)
    monkeypatch.setattr(predict_check, "measure", lambda *a: 1.0)
    subject = predict_check.Subject(workloads.TINY, None, None)  # type: ignore[arg-type]
    rows = predict_check.steady_turn(subject, None, 1.0)  # type: ignore[arg-type]
    assert {row[2] for row in rows.values()} == {20e9} and next(rates, None) is None
