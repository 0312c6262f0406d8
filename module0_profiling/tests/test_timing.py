"""Timing: known costs in, known ratios out."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from module0_profiling.timing import Crowd, Timing, clock_for, cuda_clock, graph_clock, interleave, ratio, rotated


def test_median_best_and_spread_of_known_rounds():
    timing = Timing((4.0, 1.0, 2.0))
    assert (timing.median, timing.best, timing.spread) == (2.0, 1.0, 1.5)  # (4 - 1) / 2


def test_sleeps_of_known_length_come_back_with_their_ratio():
    timings = interleave({"slow": lambda: time.sleep(0.04), "fast": lambda: time.sleep(0.01)}, rounds=5, warmup=0)
    assert 0.04 <= timings["slow"].best < 0.2
    assert 0.01 <= timings["fast"].best < 0.1
    assert ratio(timings["slow"], timings["fast"]) == pytest.approx(4, rel=0.4)


def test_order_flips_each_round_and_warmup_is_not_timed():
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert len(timings["a"].seconds) == 3


def test_ratio_is_per_round_so_noise_that_hits_both_cancels():
    slow, fast = Timing((2.0, 20.0, 6.0)), Timing((1.0, 10.0, 3.0))  # the machine's speed changed tenfold
    assert ratio(slow, fast) == 2.0
    assert Timing((2.0, 20.0, 6.0)).median / Timing((1.0, 3.0, 3.0)).median == 2.0  # for contrast: unaligned rounds
    assert ratio(Timing((2.0, 20.0, 6.0)), Timing((1.0, 2.0, 3.0))) == 2.0  # the median of 2, 10, 2


def test_warmup_absorbs_a_slow_first_call():
    calls = []

    def first_is_slow() -> None:
        calls.append(None)
        time.sleep(0.05 if len(calls) == 1 else 0)

    assert max(interleave({"f": first_is_slow}, rounds=3)["f"].seconds) < 0.05


def test_garbage_collection_is_off_while_timing_and_back_on_after_an_error():
    assert gc.isenabled()
    seen = []
    interleave({"f": lambda: seen.append(gc.isenabled())}, warmup=0)
    assert seen == [False] * 5
    with pytest.raises(ZeroDivisionError):
        interleave({"f": lambda: 1 / 0}, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "arguments", [{"fns": {}}, {"fns": {"f": int}, "rounds": 0}, {"fns": {"f": int}, "device": "tpu"}]
)
def test_bad_arguments_are_refused_in_one_line(arguments):
    with pytest.raises(ValueError) as refused:
        interleave(**arguments)
    assert "\n" not in str(refused.value)


def test_ratio_refuses_timings_of_different_runs_and_zero_times():
    with pytest.raises(ValueError, match="one call of interleave"):
        ratio(Timing((1.0, 1.0)), Timing((1.0,)))
    with pytest.raises(ValueError, match="too short"):
        ratio(Timing((1.0,)), Timing((0.0,)))
    with pytest.raises(ValueError, match="at least one round"):
        Timing(())


def test_cuda_clock_measures_the_kernel_and_not_the_flush():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    a = torch.randn(4096, 4096, device="cuda")
    clock = clock_for("cuda")
    clock(lambda: a @ a)
    assert clock(lambda: None) < 1e-3
    assert clock(lambda: a @ a) < 0.1


def test_it_goes_on_until_the_medians_are_known_well_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two known distributions: the wider one decides, and 16 times the rounds give a quarter of the error."""
    draws = {"narrow": cycle([1.0, 1.01, 0.99, 1.0]), "wide": cycle([1.0, 1.2, 0.8, 1.0, 1.1, 0.9])}
    fns = {name: (lambda name=name: name) for name in draws}

    def clock(fn: Callable[[], object]) -> float:
        return next(draws[str(fn())])

    rough = interleave(fns, rounds=4, relative_error=0.08, clock=clock)
    fine = interleave(fns, rounds=4, relative_error=0.02, clock=clock)
    assert all(timing.relative_error <= 0.02 for timing in fine.values())
    assert 4 < len(rough["wide"].seconds) == len(rough["narrow"].seconds)
    assert 10 < len(fine["wide"].seconds) / len(rough["wide"].seconds) < 25


def test_the_time_cap_ends_what_will_never_be_precise() -> None:
    noise = random.Random(0)
    began = time.perf_counter()
    found = interleave({"noise": lambda: None}, relative_error=1e-9, seconds=0.1, clock=lambda fn: noise.random())
    assert 0.1 <= time.perf_counter() - began < 2
    assert len(found["noise"].seconds) > 5


def test_without_a_relative_error_the_rounds_are_as_many_as_asked_for() -> None:
    assert len(interleave({"noise": time.perf_counter}, rounds=7)["noise"].seconds) == 7


def test_the_error_of_a_median_is_that_of_repeated_experiments() -> None:
    """Oracle: draw many samples; about 95 % of their medians lie within the half interval that one sample gives."""
    draw = random.Random(1)
    samples = [Timing(tuple(draw.gauss(10, 1) for _ in range(64))) for _ in range(400)]
    within = sum(abs(sample.median - 10) <= sample.relative_error * sample.median for sample in samples)
    assert 0.88 < within / len(samples) <= 1


@pytest.mark.parametrize("limits", [{"relative_error": 0.0}, {"relative_error": -1.0}, {"seconds": 0.0}])
def test_a_limit_that_can_not_be_reached_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        interleave({"noise": time.perf_counter}, **limits)


def test_rotated_inputs_come_in_turns() -> None:
    seen: list[int] = []
    fn = rotated(seen.append, [1, 2, 3])
    for _ in range(7):
        fn()
    assert seen == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="at least one"):
        rotated(seen.append, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_replayed_graph_costs_less_than_its_calls() -> None:
    row = torch.ones(64, device="cuda")
    called, replayed = (clock(lambda: row.add_(1)) for clock in (cuda_clock("cuda"), graph_clock("cuda", calls=100)))
    assert 0 < replayed < called


def test_a_crowd_is_noticed_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many spinning processes as there are cores take turns with this one; one alone on its cores is not crowded."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.3)
        crowd, ends = Crowd(), time.perf_counter() + 1.5
        while time.perf_counter() < ends:
            pass
        monkeypatch.setattr(Crowd, "SWITCHES", 5)  # a single thread is switched out less often than a pair that waits
        assert crowd.crowded
    finally:
        for other in others:
            other.kill()
            other.wait()
    monkeypatch.setattr(Crowd, "_count", staticmethod(lambda: 7))
    assert not Crowd().crowded
