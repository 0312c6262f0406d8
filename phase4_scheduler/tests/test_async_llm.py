"""The client with a model behind it: the same answers as offline, whatever else runs; and crowds that come and go."""

from __future__ import annotations

import asyncio
import random

import pytest

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.async_llm import AsyncLLM, EngineError
from phase4_scheduler.tests.engines import PATIENCE, PROMPT, null_llm, run, tokens, until

SETTINGS = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "seed": 5}
GREEDY = {"temperature": 0, "max_tokens": 16}
REQUESTS = [
    ("def binary_search(", GREEDY),
    ('class Queue:\n    """', {**GREEDY, "max_tokens": 28}),
    ("def add(a, b):", {**GREEDY, "logprobs": 3}),
    ("import os\n\n", {**GREEDY, "prompt_logprobs": 2, "max_tokens": 3}),
    ("def f(x):\n    return", {"max_tokens": 12}),  # sampled, with a seed that the engine derives
    ("# über 你好 👋", {"temperature": 1.0, "n": 2, "seed": 11, "max_tokens": 20}),
    ("for i in", {**GREEDY, "stop": ["\n", "range("]}),
    ("while", {**GREEDY, "stop": [":"], "include_stop_str_in_output": True, "logprobs": 0}),
    ("x = [1, 2", {"temperature": 0.7, "repetition_penalty": 1.2, "max_tokens": 9}),
    ([10, 20, 30], {**GREEDY, "ignore_eos": True}),
]


@pytest.fixture(scope="module")
def offline():
    """What the first phase's engine answers to each, one after the other."""
    import torch

    from phase0_prototype.llm import LLM

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two processes that spin for two cores starve each other
    llm = LLM("titan-tiny", use="phase0=solution", max_num_seqs=4, **SETTINGS)
    prompts, params = zip(*REQUESTS, strict=True)
    yield [
        llm.generate([prompt], [SamplingParams(**wanted)])[0] for prompt, wanted in zip(prompts, params, strict=True)
    ]
    torch.set_num_threads(before)


async def streamed(stream):
    """The answer of a reader that puts pieces together."""
    texts, ids, logprobs = ([""] * stream.params.n, *([[] for _ in range(stream.params.n)] for _ in range(2)))
    async for pieces in stream:
        for piece in pieces:
            texts[piece.index] += piece.text
            ids[piece.index] += piece.token_ids
            logprobs[piece.index] += piece.logprobs or []
    return texts, ids, logprobs


def close(found, expected):
    """Equal but for the last bits of sums in another order."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        assert one.keys() == other.keys()
        for token, value in other.items():
            assert one[token].logprob == pytest.approx(value.logprob, abs=1e-4)
            assert (one[token].rank, one[token].decoded_token) == (value.rank, value.decoded_token)


def test_answers_are_those_of_the_offline_engine_all_at_once_whole_and_streamed(offline, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the engine's process

    async def work():
        settings = {**SETTINGS, "max_num_batched_tokens": 16, "num_blocks": 200}  # prompts go in pieces
        llm = AsyncLLM("titan-tiny", settings, use=",".join(f"phase{i}=solution" for i in range(5)))
        await llm.start()
        with pytest.raises(EngineError, match="starting"):
            llm.submit(PROMPT, tokens(1))
        info = await llm.ready(2 * PATIENCE)
        assert (info.max_model_len, info.vocab_size, info.eos_token_ids) == (256, 4096, [0])
        assert llm.state == "ready" and info.weight_bytes > 0 and "phase4: solution" in info.described
        submitted = [llm.submit(prompt, SamplingParams(**wanted)) for prompt, wanted in REQUESTS]
        outputs = await asyncio.gather(*(stream.output() for stream in submitted))
        again = [
            llm.submit(prompt, SamplingParams(**{"seed": stream_seed(i), **wanted}))
            for i, (prompt, wanted) in enumerate(REQUESTS)
        ]
        pieces = await asyncio.gather(*(streamed(stream) for stream in again))
        await until(lambda: llm.stats.kv_blocks_free == llm.stats.kv_blocks)
        with pytest.raises(UserError, match="max_model_len is 256"):
            llm.submit([1] * 256, tokens(1))
        with pytest.raises(UserError, match="not an integer of the vocabulary"):
            llm.submit([4096], tokens(1))
        await llm.shutdown()
        return outputs, again, pieces

    outputs, again, pieces = run(work())
    for expected, output, stream, (texts, ids, logprobs) in zip(offline, outputs, again, pieces, strict=True):
        assert [o.text for o in output.outputs] == [o.text for o in expected.outputs] == texts
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs] == ids
        assert [(o.finish_reason, o.stop_reason) for o in output.outputs] == [
            (o.finish_reason, o.stop_reason) for o in expected.outputs
        ]
        assert (output.prompt, output.prompt_token_ids) == (expected.prompt, expected.prompt_token_ids)
        for one, other, read in zip(output.outputs, expected.outputs, logprobs, strict=True):
            assert (one.logprobs is None) == (other.logprobs is None)
            close(one.logprobs or [], other.logprobs or [])
            close(read, other.logprobs or [])
            if other.cumulative_logprob is not None:
                assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
        assert (output.prompt_logprobs is None) == (expected.prompt_logprobs is None)
        close(output.prompt_logprobs or [], expected.prompt_logprobs or [])
        close(stream.prompt_logprobs or [], expected.prompt_logprobs or [])


def stream_seed(index: int) -> int:
    """Of the index-th request of an engine with the seed of `SETTINGS`."""
    from phase0_prototype.seeds import derive_seed

    return derive_seed(SETTINGS["seed"], index)


def test_a_crowd_that_comes_and_goes_ends_each_exactly_once_and_leaves_no_block():
    async def work():
        async with null_llm(max_num_seqs=16, num_blocks=600, max_model_len=8192, step_seconds=0.002) as llm:
            rng, ends = random.Random(3), []

            async def one(i):
                await asyncio.sleep(rng.random() * 1.5)
                stream = llm.submit([1] * rng.randrange(1, 300), tokens(rng.randrange(1, 120), n=rng.choice([1, 1, 3])))
                leaves = rng.choice(["reads", "reads", "cancels", "walks away", "is cut off", "is impatient"])
                got = []
                try:
                    async with stream:
                        async for pieces in stream:
                            got += [piece.finish_reason for piece in pieces if piece.finish_reason]
                            if leaves == "cancels" and rng.random() < 0.05:
                                llm.cancel(stream.request_id)
                            if leaves == "walks away" and rng.random() < 0.05:
                                break
                            if leaves == "is cut off" and rng.random() < 0.05:
                                asyncio.current_task().cancel()
                                await asyncio.sleep(0)
                            if leaves == "is impatient":
                                await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    assert leaves == "is cut off"
                if leaves in ("reads", "is impatient"):
                    assert got == ["length"] * stream.params.n
                assert stream.finished
                outputs = stream.so_far().outputs
                ends.append([o.finish_reason for o in outputs])
                assert all(len(o.token_ids) == stream.params.max_tokens for o in outputs if o.finish_reason == "length")

            await asyncio.gather(*(one(i) for i in range(250)))
            assert len(ends) == 250 and all(reason in ("length", "abort") for one in ends for reason in one)
            assert llm.in_flight == 0 and await llm.drained(0)
            await until(lambda: llm.stats.running + llm.stats.waiting + llm.stats.swapped == 0)
            await until(lambda: llm.stats.kv_blocks_free == llm.stats.kv_blocks == 600)
            assert llm.restarts == 0

    run(work())


def test_a_request_that_nobody_wants_any_more_costs_no_more_steps():
    async def work():
        async with null_llm() as llm:
            async with llm.submit(PROMPT, tokens(8000)) as stream:
                await anext(stream)
            await until(lambda: llm.stats.running == 0 and llm.stats.generated_tokens > 0, 1.0 + PATIENCE)
            assert llm.stats.generated_tokens < 2000
            stopped = await llm.generate(PROMPT, tokens(8000, stop=["Hola"], seed=0))
            assert stopped.outputs[0].stop_reason == "Hola"
            await until(lambda: llm.stats.running == 0)
            assert llm.stats.generated_tokens < 3000

    run(work())


@pytest.mark.parametrize(
    ("prompt", "more", "what"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ([True], {}, "not an integer"),
        (["a"], {}, "not an integer"),
        (PROMPT, {"priority": 1.5}, "priority"),
        (PROMPT, {"priority": 2**40}, "priority"),
        (PROMPT, {"timeout": 0}, "timeout"),
        (PROMPT, {"timeout": float("nan")}, "timeout"),
        (PROMPT, {"request_id": "mine"}, "'mine'"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(shared, prompt, more, what):
    runner, llm = shared

    async def work():
        async with llm.submit(PROMPT, tokens(8000), request_id="mine"):
            with pytest.raises(UserError, match=what) as told:
                llm.submit(prompt, tokens(1), **more)
            assert "\n" not in str(told.value)
            assert llm.in_flight == 1

    runner.run(work())


def test_an_id_can_be_used_again_when_its_request_has_ended(shared):
    runner, llm = shared

    async def work():
        for _ in range(3):
            assert (await llm.generate(PROMPT, tokens(1), request_id="again")).request_id == "again"
        llm.cancel("again")

    runner.run(work())


def test_urgent_requests_pass_the_others_where_the_policy_says_so():
    async def work():
        async with null_llm(scheduling_policy="priority", max_num_seqs=1) as llm:
            order = []

            async def one(name, priority):
                await llm.generate(PROMPT, tokens(5), priority=priority)
                order.append(name)

            async with llm.submit(PROMPT, tokens(8000), priority=-9) as first:
                await anext(first)
                waiting = [asyncio.create_task(one(name, p)) for name, p in (("late", 5), ("soon", 1), ("now", -1))]
                await until(lambda: llm.stats.waiting == 3)
            await asyncio.gather(*waiting)
            assert order == ["now", "soon", "late"]

    run(work())


@pytest.fixture(scope="module")
def shared():
    """A client with an event loop that lasts."""
    with asyncio.Runner() as runner:
        manager = null_llm()
        llm = runner.run(manager.__aenter__())
        yield runner, llm
        runner.run(manager.__aexit__(None, None, None))
