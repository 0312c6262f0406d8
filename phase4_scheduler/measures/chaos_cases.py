"""Benchmark cases of what must not be lost: storms of requests, signals at any moment, memory over thousands."""

from __future__ import annotations

import random
import signal

from module0_profiling.bench import Options
from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.results import Figure
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import TINY
from phase4_scheduler.llm import LLM
from phase4_scheduler.measures.chaos import ENDS, Report, last_wave, storm
from phase4_scheduler.measures.chaos_drift import Memory
from phase4_scheduler.measures.chaos_drift import drift as measure_drift
from phase4_scheduler.measures.chaos_oracle import Expected, of_answers, of_null
from phase4_scheduler.measures.chaos_plan import asks
from phase4_scheduler.measures.chaos_server import Victim, kill
from phase4_scheduler.measures.chaos_signals import start_time, while_starting
from phase4_scheduler.measures.our_server import NULL

REQUESTS, STREAMS, SIGNALS = 2000, 2000, 50
DRIFT, WARM_UP, PARTS = 10_000, 10_000, 10
DRIFT_TINY, WARM_UP_TINY = 300, 100
STOPS = ("Hola", "👋", "greet(name)", "\n\n")
OPTIONS = ("--log-interval", "3600", "--shutdown-timeout", "120")
STORMY = {
    "step_seconds": 0.003, "max_num_seqs": 32, "num_blocks": 512, "max_model_len": 1024,
    "max_num_batched_tokens": 128, "preemption": "swap", "swap_blocks": 64,
}  # fmt: skip
CALM = {"step_seconds": 0.001, "max_num_seqs": 64, "num_blocks": 2048, "max_model_len": 1024}
PROMPTS = ("def binary_search(", "class Queue:\n    ", "import os\n", "for i in range(", "x = [", "while True:\n")
LONGEST = 24


def chaos(options: Options) -> tuple[Figure, ...]:
    """Requests of all kinds whose clients leave, an engine that is killed, SIGTERM at the end; then many streams at
    once; then signals while servers start.

    Raises:
        CheckFailed: a request was lost or ended twice, an answer was not its own, or something was left.
    """
    with Victim(NULL, STORMY, OPTIONS) as victim:
        victim.wait_ready()
        report = storm(
            victim,
            asks(options.size(REQUESTS, 40), 1, stops=STOPS),
            of_null(),
            concurrency=options.size(200, 20),
            at_half=lambda: _kill_engine(victim),
        )
        _check("the storm", report)
        last = last_wave(victim, asks(options.size(REQUESTS // 10, 5), 2, calm=True), of_null())
        _check("the last wave", last)
    books = {f"storm/{name}": Figure(f"storm/{name}", last.books[name], "requests") for name in ("accepted", *ENDS)}
    return (
        *books.values(),
        Figure("storm/lost", last.books["accepted"] - sum(last.books[name] for name in ENDS), "requests"),
        Figure("storm/engines killed", report.restarts, ""),
        Figure("storm/quiet after", report.quiet_after, "s", note="until nothing ran and all blocks were free"),
        *_streams(options),
        *_signals(options),
    )


def _kill_engine(victim: Victim) -> None:
    engine = victim.engine()
    if engine is not None:
        kill(engine)


def _streams(options: Options) -> tuple[Figure, ...]:
    count = options.size(STREAMS, 20)
    settings = {"step_seconds": 0.01, "max_num_seqs": count, "num_blocks": 64 * count, "max_model_len": 1024}
    with Victim(NULL, settings, OPTIONS) as victim:
        victim.wait_ready()
        report = storm(victim, asks(count, 3, longest=40, calm=True), of_null(), concurrency=count)
        _check("the streams", report)
    refused = sum(outcome.attempts > 1 for outcome in report.outcomes)
    return (
        Figure("streams/at once", count, "requests"),
        Figure("streams/refused or failed", refused, "requests"),
        Figure("streams/all answered after", report.seconds, "s"),
    )


def _signals(options: Options) -> tuple[Figure, ...]:
    rng = random.Random(4)
    usual = start_time(NULL, CALM)
    kinds = ((signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM))
    count = options.size(SIGNALS, 2)
    for i in range(count):
        faults = while_starting(NULL, CALM, rng.uniform(0, 1.2 * usual), kinds[i % len(kinds)])
        if faults:
            raise CheckFailed(faults[0])
    return (Figure("signals while starting/servers that ended cleanly", count, "servers"),)


def drift(options: Options) -> tuple[Figure, ...]:
    """Memory of the API and of the engine after the warm-up, and after the requests that follow.

    Raises:
        CheckFailed: an answer was wrong.
    """
    figures: list[Figure] = []
    with Victim(NULL, CALM, OPTIONS) as victim:
        victim.wait_ready()
        warm_up, count = options.size(WARM_UP, 20), options.size(DRIFT, 40)
        plan = asks(warm_up + count, 5, longest=20)
        figures += _drift("null", measure_drift(victim, plan, of_null(), warm_up=warm_up, parts=PARTS, concurrency=64))
    settings = {"dtype": "float32", "device": "cpu", "max_num_seqs": 16, "max_model_len": 512, "num_blocks": 128}
    with Victim(TINY, settings, OPTIONS) as victim:
        victim.wait_ready()
        warm_up, count = options.size(WARM_UP_TINY, 4), options.size(DRIFT_TINY, 8)
        plan = asks(warm_up + count, 6, prompts=PROMPTS, longest=LONGEST)
        found = measure_drift(victim, plan, _alone(), warm_up=warm_up, parts=3, concurrency=16)
        figures += _drift(TINY, found)
    return tuple(figures)


def _drift(name: str, memories: tuple[Memory, Memory]) -> list[Figure]:
    found = []
    for memory in memories:
        note = " ".join(f"{size / 1e6:.1f}" for size in memory.sizes)
        found.append(Figure(f"{name}/{memory.name}", 100 * memory.drift, "%", note=f"MB: {note}"))
    return found


def _alone() -> Expected:
    """Greedy answers to the prompts, one at a time."""
    llm = LLM(TINY, dtype="float32", device="cpu")
    params = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    outputs = [llm.generate(prompt, params, progress=False)[0] for prompt in PROMPTS]
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    return of_answers([output.outputs[0].token_ids for output in outputs], tokenizer.decode)


def _check(name: str, report: Report) -> None:
    if report.faults:
        raise CheckFailed(f"{name}: {len(report.faults)} faults, such as {report.faults[0]}")
