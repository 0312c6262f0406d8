"""Timing: known costs in, known ratios out."""

from __future__ import annotations

import gc
import time

import pytest

from module0_profiling.timing import Timing, clock_for, interleave, ratio


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
