"""Verdicts on runs whose cause is known, because the evidence was made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from module0_profiling.why_slow import ARITHMETIC, CALLS, MEMORY, RECOMPUTATION, Evidence, diagnose, parts

# A bfloat16 model of 1.1e9 weights on a CPU that reads 60 GB/s: 36.7 ms of a step of 40 ms are reading.
BIG = Evidence(
    subject="big",
    on_gpu=False,
    runner="eager",
    needed=71,
    computed=71,
    generated=64,
    sequences=1,
    rows=1,
    step=40e-3,
    busy=0.97,
    calls=900,
    call_seconds=1e-6,
    forward=0.99,
    weight_bytes=2.2e9,
    weight_bits=16,
    kv_bytes=1e6,
    flops_per_token=2.2e9,
    bandwidth=60e9,
    flops=400e9,
    half_flops=400e9,
    cache_bytes=32e6,
    threads=2,
    cores=2,
)
TINY = replace(
    BIG, weight_bytes=13e6, kv_bytes=1e5, flops_per_token=13e6, step=3e-3, busy=0.65, calls=1400, forward=0.8
)
FORGETFUL = replace(TINY, needed=207, computed=21_500, generated=200, rows=108, step=22e-3, busy=0.87, calls=2400)
CROWD = replace(BIG, sequences=64, rows=64, needed=64 * 71, computed=64 * 71, step=400e-3, kv_bytes=64e6)


def whats(evidence: Evidence) -> list[str]:
    return [advice.what for advice in diagnose(evidence).advices]


def test_a_large_model_alone_is_bound_by_memory_and_smaller_weights_come_first():
    verdict = diagnose(BIG)
    assert verdict.bound == MEMORY
    assert "2.20 GB" in verdict.headline and "92 %" in verdict.headline
    assert verdict.advices[0].what.startswith("smaller weights")
    p, packed = parts(BIG), (2.2e9 * 4.5 / 16 + 1e6) / 60e9
    working = (p.floor + p.slower) * packed / p.floor  # the operators reach the same share of the memory's rate
    assert verdict.advices[0].gain == pytest.approx(40e-3 / (p.overhead + working))
    assert verdict.advices[1].what == "batch 8" and 5 < verdict.advices[1].gain < 8


def test_a_small_model_called_operator_by_operator_is_bound_by_the_calls():
    verdict = diagnose(TINY)
    assert verdict.bound == CALLS and "Python and dispatch" in verdict.headline
    assert verdict.advices[0].what.startswith("fewer calls (runner compile")
    p = parts(TINY)
    assert p.overhead == pytest.approx(0.35 * 3e-3 + 1400e-6) and p.outside == pytest.approx(0.2 * 3e-3)
    assert verdict.advices[0].gain == pytest.approx(3e-3 / (3e-3 - p.calls))


def test_a_missing_cache_is_the_fault_whatever_else_is_slow():
    verdict = diagnose(FORGETFUL)
    assert verdict.bound == RECOMPUTATION
    assert "no KV cache" in verdict.headline and "21,500" in verdict.headline and "207" in verdict.headline
    first = verdict.advices[0]
    assert first.what == "keep a KV cache" and 3 < first.gain <= 21_500 / 207


def test_the_gain_of_a_cache_is_never_more_than_the_tokens_that_it_saves():
    assert diagnose(replace(FORGETFUL, computed=300)).advices[0].gain <= 300 / 207


def test_many_sequences_are_bound_by_arithmetic_and_a_larger_batch_is_no_advice():
    verdict = diagnose(CROWD)
    assert verdict.bound == ARITHMETIC and "GFLOP" in verdict.headline
    assert not any(advice.what.startswith(("batch", "smaller")) for advice in verdict.advices)


def test_float32_is_told_of_16_bits_first_when_arithmetic_is_the_bound():
    full = replace(CROWD, weight_bits=32, weight_bytes=4.4e9, flops=200e9, step=800e-3)
    assert diagnose(full).bound == ARITHMETIC and whats(full)[0].startswith("16-bit")
    assert diagnose(full).advices[0].gain == pytest.approx(800 / (800 / 2 + 0.04 * 400), rel=0.02)  # 97 % busy


def test_a_compiled_step_is_not_told_to_compile():
    assert any("compile" in what for what in whats(TINY))
    assert not any("compile" in what for what in whats(replace(TINY, runner="compile")))


def test_a_gpu_waits_for_its_calls_while_it_is_idle():
    gpu = replace(TINY, on_gpu=True, busy=0.2, threads=0, cores=0, bandwidth=4e12, flops=900e12)
    assert parts(gpu).overhead == pytest.approx(0.8 * 3e-3)
    assert diagnose(gpu).bound == CALLS and "cuda-graph" in whats(gpu)[0]


def test_cores_that_do_nothing_are_named():
    lazy = replace(BIG, threads=1, step=75e-3)
    assert "all 2 cores" in whats(lazy)
    assert any("1 of 2 cores" in finding for finding in diagnose(lazy).findings)


def test_a_run_at_its_floor_is_left_alone_by_advice_that_would_gain_nothing():
    perfect = replace(BIG, step=2.201e9 / 60e9, weight_bits=4, sequences=1, busy=1.0, call_seconds=0.0, forward=1.0)
    assert whats(perfect) == ["batch 8"]


@given(
    step=st.floats(1e-5, 1),
    busy=st.floats(0, 1),
    forward=st.floats(0, 1),
    calls=st.floats(0, 1e4),
    sequences=st.floats(1, 64),
    waste=st.floats(1, 100),
    weights=st.floats(1e6, 1e11),
)
def test_parts_add_up_to_the_step_and_advice_promises_a_gain(step, busy, forward, calls, sequences, waste, weights):
    e = replace(
        BIG, step=step, busy=busy, forward=forward, calls=calls, sequences=sequences, rows=sequences * waste,
        computed=int(71 * waste), weight_bytes=weights,
    )  # fmt: skip
    p, verdict = parts(e), diagnose(e)
    assert min(p.calls, p.outside, p.slower) >= 0
    assert p.floor + p.overhead + p.slower == pytest.approx(max(step, p.floor))
    assert len(verdict.advices) <= 3 and all(advice.gain > 1 for advice in verdict.advices)
    assert (verdict.bound == RECOMPUTATION) == (e.waste >= 1.25)
