"""Many requests of all kinds, whose clients leave, whose time passes, whose engine is killed: nothing is lost."""

from __future__ import annotations

import sys

import psutil
import pytest

from phase0_prototype.llm import LLM
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.measures.chaos import ENDS, last_wave, storm
from phase4_scheduler.measures.chaos_client import Outcome, Told
from phase4_scheduler.measures.chaos_oracle import Expected, faults, of_answers, of_null
from phase4_scheduler.measures.chaos_plan import Ask, asks
from phase4_scheduler.measures.chaos_server import Victim, kill
from phase4_scheduler.null_engine import TEXT
from phase4_scheduler.tests.engines import tiny_tokenizer

STOPS = ("Hola", "👋", "greet(name)", "\n\n")
PROMPTS = [
    "def binary_search(", "class Queue:\n    ", "import os\n", "for i in range(", "# the sum of two\n", "while True:\n",
    "def add(a, b):", "try:\n    ", "x = [", "@property\n    def ",
]  # fmt: skip
LONGEST = 64


def test_nothing_is_lost_in_a_storm_of_200_requests_and_a_signal_at_its_end(null: Victim) -> None:
    """F1, F2, F5, F20, F21, F24 together; the invariants are in `measures/chaos.py`."""

    def boom() -> None:
        engine = null.engine()
        assert engine is not None
        kill(engine)

    report = storm(null, asks(200, 1, stops=STOPS), of_null(), concurrency=64, at_half=boom)
    assert report.faults == []
    assert report.restarts == 1
    assert all(report.books[reason] > 0 for reason in ENDS), "every kind of end was there"
    last = last_wave(null, asks(30, 2, calm=True), of_null())
    assert last.faults == []
    assert {outcome.status for outcome in last.outcomes} <= {0, 200, 503}
    assert last.books["accepted"] == report.books["accepted"] + sum(o.status == 200 for o in last.outcomes)


@pytest.fixture(scope="module")
def alone(one_thread: None) -> Expected:
    """The engine of phase 0, one request at a time."""
    llm = LLM("titan-tiny", use="phase0=solution", dtype="float32", device="cpu")
    params = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    outputs = [llm.generate(prompt, params, progress=False)[0] for prompt in PROMPTS]
    return of_answers([output.outputs[0].token_ids for output in outputs], tiny_tokenizer().decode)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
def test_a_disk_that_is_full_costs_a_recomputation_and_nothing_else(tiny: Victim, alone: Expected) -> None:
    """The file for swapped sequences can't be written any more in the middle of a storm."""
    engine = tiny.engine()
    assert engine is not None
    before = tiny.load()

    def fill() -> None:
        engine.rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))

    long = asks(20, 3, prompts=PROMPTS, shortest=48, longest=LONGEST, calm=True)
    report = storm(tiny, long, alone, concurrency=20, at_half=fill)
    engine.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert report.faults == []
    assert report.restarts == 0
    after = tiny.load()
    assert after["preemptions"] > before["preemptions"] and after["recomputed_tokens"] > before["recomputed_tokens"]


def test_greedy_answers_of_a_model_are_those_without_faults(tiny: Victim, alone: Expected) -> None:
    """40 requests, preempted to a file, in pieces, beside clients that leave; the engine is killed in the middle."""

    def boom() -> None:
        engine = tiny.engine()
        assert engine is not None
        kill(engine)

    report = storm(tiny, asks(40, 4, prompts=PROMPTS, longest=LONGEST), alone, concurrency=16, at_half=boom)
    assert report.faults == []
    assert report.restarts == 1
    last = last_wave(tiny, asks(6, 5, prompts=PROMPTS, longest=LONGEST, calm=True), alone)
    assert last.faults == []


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        ({"token_ids": [1]}, "are not those of"),
        ({"text": "other"}, "is not that of"),
        ({"ends": []}, "0 ends"),
        ({"ends": [("length", None)] * 2}, "2 ends"),
        ({"ends": [("abort", None)]}, "aborted"),
        ({"ends": [("stop", "Hola")]}, "it stopped at"),
        ({"is_late": True}, "after its end"),
    ],
)
def test_the_oracle_finds_what_is_wrong(spoil: dict, what: str) -> None:
    ask = Ask(0, "/v1/completions", {"prompt": "x", "max_tokens": 9, "stream": True}, 0)
    alone = of_null()(ask, 0)
    assert alone.text == TEXT[: len(alone.text)]
    good = Told(alone.text, alone.token_ids, [("length", None)])
    assert faults(ask, Outcome(200, sequences={0: good}, is_complete=True), of_null()) == []
    bad = Told(**{"text": good.text, "token_ids": good.token_ids, "ends": good.ends, **spoil})
    assert any(what in fault for fault in faults(ask, Outcome(200, sequences={0: bad}, is_complete=True), of_null()))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        ({"status": 500}, "status 500"),
        ({"status": 503}, "without Retry-After"),
        ({"errors": ["a", "b"]}, "2 errors"),
        ({"is_complete": False}, "no end"),
        ({"broken": "reset"}, "broke"),
        ({"sequences": {}}, r"sequences [] of 1"),
        ({"sequences": {1: Told()}}, "a sequence 1 of 1"),
    ],
)
def test_the_oracle_finds_answers_that_are_no_answers(spoil: dict, what: str) -> None:
    ask = Ask(0, "/v1/completions", {"prompt": "x", "max_tokens": 9, "stream": True}, 0)
    alone = of_null()(ask, 0)
    good = {"status": 200, "is_complete": True, "sequences": {0: Told(alone.text, alone.token_ids, [("length", None)])}}
    assert any(what in fault for fault in faults(ask, Outcome(**{**good, **spoil}), of_null()))
