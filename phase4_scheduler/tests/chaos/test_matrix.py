"""Every pair of features together (a server died of two that were fine alone, CVE-2026-44223)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from phase0_prototype.llm import LLM as Prototype
from phase0_prototype.outputs import CompletionOutput, RequestOutput
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.llm import LLM
from phase4_scheduler.scheduler import REJECTED

FACTORS: dict[str, list[dict[str, Any]]] = {
    "sampling": [{"temperature": 1.0, "top_k": 1}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 20, "min_p": 0.01}],
    "n": [{"n": 1}, {"n": 3}],
    "logprobs": [{}, {"logprobs": 0}, {"logprobs": 5}],
    "prompt_logprobs": [{}, {"prompt_logprobs": 2}],
    "stop": [{}, {"stop": ["\n", "return"]}, {"stop_token_ids": [25, 30, 261], "min_tokens": 3}],
    "penalties": [{}, {"presence_penalty": 0.5, "frequency_penalty": 0.3}, {"repetition_penalty": 1.2}],
    "engine": [
        {"enable_chunked_prefill": True, "preemption": "recompute", "async_scheduling": "off"},
        {"enable_chunked_prefill": False, "preemption": "recompute", "async_scheduling": "on"},
        {"enable_chunked_prefill": True, "preemption": "swap", "async_scheduling": "on"},
        {"enable_chunked_prefill": False, "preemption": "swap", "async_scheduling": "off"},
        {"enable_chunked_prefill": True, "preemption": "reject", "async_scheduling": "on"},
        {"enable_chunked_prefill": False, "preemption": "reject", "async_scheduling": "off"},
    ],
}
Row = tuple[int, ...]  # a level of each factor
PROMPT = "def search(rows, key):\n    for row in rows:\n        "
LENGTHS = (1, 2, 5)  # times that a prompt says it
TOKENS = 40
FEW = {"max_model_len": 192, "num_blocks": 12, "block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 192}
BALLAST = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)


def pairs(row: Row) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """What is together in a row: (factor, level) by two."""
    return set(itertools.combinations(enumerate(row), 2))


def covering(seed: int) -> list[Row]:
    """Rows that have every pair of levels, greedily few."""
    every = list(itertools.product(*(range(len(levels)) for levels in FACTORS.values())))
    random.Random(seed).shuffle(every)
    left = set().union(*map(pairs, every))
    rows = []
    while left:
        rows.append(max(every, key=lambda row: len(pairs(row) & left)))
        left -= pairs(rows[-1])
    return rows


ROWS = covering(17)


def asked(row: Row, number: int) -> SamplingParams:
    """What a row asks of sampling."""
    fields: dict[str, Any] = {"max_tokens": TOKENS, "seed": number, "ignore_eos": True}
    for levels, level in list(zip(FACTORS.values(), row, strict=True))[:-1]:
        fields |= levels[level]
    return SamplingParams(**fields)


def prompt(number: int) -> str:
    """Of a row."""
    return f"# {number}\n" + PROMPT * LENGTHS[number % len(LENGTHS)]


@pytest.fixture(scope="module")
def alone(one_thread: None) -> list[RequestOutput]:
    """Each row by the engine of phase 0, which knows no batches."""
    llm = Prototype("titan-tiny", use="phase0=solution", dtype="float32", device="cpu")
    return [llm.generate(prompt(i), asked(row, i), progress=False)[0] for i, row in enumerate(ROWS)]


def test_there_is_a_row_for_every_pair() -> None:
    levels = [len(one) for one in FACTORS.values()]
    wanted = sum(a * b for a, b in itertools.combinations(levels, 2))
    assert len(set().union(*map(pairs, ROWS))) == wanted
    assert len(ROWS) < 40


@pytest.mark.parametrize("engine", range(len(FACTORS["engine"])))
def test_f17_features_that_meet_leave_each_other_alone(engine: int, alone: list[RequestOutput]) -> None:
    """All rows of an engine at once, in so few blocks that they push each other out, are what they are alone."""
    settings = FACTORS["engine"][engine]
    llm = LLM("titan-tiny", dtype="float32", device="cpu", **FEW, **settings)
    mine = [i for i, row in enumerate(ROWS) if row[-1] == engine]
    prompts = [*(prompt(i) for i in mine), *[PROMPT] * 4]
    outputs = llm.generate(prompts, [*(asked(ROWS[i], i) for i in mine), *[BALLAST] * 4], progress=False)
    assert len(mine) >= 3
    scheduler: Any = llm.engine.loop.scheduler
    pushed_out = [o for one in outputs for o in one.outputs if o.stop_reason == REJECTED]
    assert pushed_out if settings["preemption"] == "reject" else scheduler.preemptions
    for i, output in zip(mine, outputs, strict=False):
        same_prompt(output, alone[i])
        for got, wanted in zip(output.outputs, alone[i].outputs, strict=True):
            if settings["preemption"] == "reject" and got.finish_reason == "abort":
                assert got.stop_reason == REJECTED
                assert got.token_ids == wanted.token_ids[: len(got.token_ids)]
            else:
                same(got, wanted)
    kv = llm.engine.kv
    assert kv.num_free == kv.tables.num_blocks


def same(got: CompletionOutput, wanted: CompletionOutput) -> None:
    """Two answers: tokens, text, end, and log-probabilities as near as float32 is."""
    assert (got.token_ids, got.text) == (wanted.token_ids, wanted.text)
    assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
    assert (got.logprobs is None) == (wanted.logprobs is None)
    for one, other in zip(got.logprobs or [], wanted.logprobs or [], strict=True):
        assert {i: lp.logprob for i, lp in one.items()} == pytest.approx(
            {i: lp.logprob for i, lp in other.items()}, abs=1e-3
        )


def same_prompt(got: RequestOutput, wanted: RequestOutput) -> None:
    """Log-probabilities of a prompt."""
    assert (got.prompt_logprobs is None) == (wanted.prompt_logprobs is None)
    positions: Iterator[Any] = zip(got.prompt_logprobs or [], wanted.prompt_logprobs or [], strict=True)
    for one, other in positions:
        assert (one is None) == (other is None)
        if one is not None:
            values = {i: lp.logprob for i, lp in one.items()}
            assert values == pytest.approx({i: lp.logprob for i, lp in other.items()}, abs=1e-3)
