"""Rounds in which the memory's bandwidth changed are repeated, and only so often."""

from __future__ import annotations

from itertools import chain, repeat

import pytest

from phase0_prototype import bandwidth, workloads
from phase0_prototype.llm import LLM


@pytest.fixture(scope="module")
def llm(checkpoint):
    return LLM(checkpoint("llama-one-layer").path, device="cpu", max_num_seqs=1)


def measured(llm, monkeypatch, peaks, rounds=2):
    peaks = iter(peaks)
    monkeypatch.setattr(bandwidth, "PROMPT", 8)
    monkeypatch.setattr(bandwidth, "NEW", 3)
    monkeypatch.setattr(bandwidth, "read_bandwidth_now", lambda device: next(peaks))
    return bandwidth.decode_shares(llm, rounds)


def test_a_steady_memory_wastes_no_round(llm, monkeypatch):
    found = measured(llm, monkeypatch, [10e9, 11e9, 10e9])
    assert found.skipped == 0 and found.bandwidth == (10.5e9, 10.5e9)
    least = workloads.bytes_per_step(llm, 8, 3)
    assert all(least / read > 1e-6 for read in found.read)  # bytes over bytes/s: the seconds of a step
    assert found.shares == tuple(r / 10.5e9 for r in found.read)


def test_a_round_that_saw_two_bandwidths_is_repeated(llm, monkeypatch):
    found = measured(llm, monkeypatch, [10e9, 20e9, 20e9, 10e9, 10e9])
    assert found.skipped == 2 and found.bandwidth == (20e9, 10e9)


def test_a_memory_that_never_settles_is_measured_all_the_same(llm, monkeypatch):
    found = measured(llm, monkeypatch, chain.from_iterable(repeat((10e9, 20e9))))
    assert found.skipped == 6 and len(found.shares) == 2
