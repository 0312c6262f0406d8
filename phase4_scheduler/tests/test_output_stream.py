"""The reader's side of a request: text from deltas, merged for slow readers, with exactly one end."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core.deltas import ALL
from phase4_scheduler.core.errors import EngineError
from phase4_scheduler.core.wire import Delta, Ranked
from phase4_scheduler.output_stream import Stream
from phase4_scheduler.tests.engines import run, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = TOKENIZER.encode("def f(x):")
TEXT = " return 'ä€😀 您好' # stop here, or stop there\n\n\nclass A: pass"
TOKENS = TOKENIZER.encode(TEXT)


class Recorded(Stream):
    """A stream that remembers what it told the engine, and how often it ended."""

    def __init__(self, params: SamplingParams) -> None:
        self.aborted: list[int] = []
        self.ends = 0
        super().__init__(
            "id", "def f(x):", PROMPT, params, TOKENIZER, abort=self.aborted.append, on_end=self._count_end
        )

    def _count_end(self) -> None:
        self.ends += 1


def delta(new, finish=None, stop=None, index=0, **more):
    return Delta("id", index, list(new), finish_reason=finish, stop_reason=stop, **more)


async def rest(stream):
    return [piece async for pieces in stream for piece in pieces]


CUTS = st.lists(st.integers(0, len(TOKENS)), max_size=20).map(sorted)
STOPS = st.sampled_from([[], ["stop"], ["here", "stop there"], ["😀 "], ["\n\n"], ["zzz"], [" pass"], ["好'"]])


@settings(max_examples=60, deadline=None)
@given(CUTS, st.lists(st.booleans(), min_size=21, max_size=21), STOPS, st.booleans())
def test_text_is_the_same_however_tokens_arrive_and_are_read(cuts, looks, stop, include):
    async def work():
        params = SamplingParams(max_tokens=200, stop=stop, include_stop_str_in_output=include)
        stream, pieces, sent = Recorded(params), [], []
        for (start, end), look in zip(zip([0, *cuts], [*cuts, len(TOKENS)], strict=True), looks, strict=False):
            if stream.aborted:
                break  # the engine was told, and is quick
            stream.take(delta(TOKENS[start:end], "length" if end == len(TOKENS) else None))
            sent += TOKENS[start:end]
            if look and not stream.finished and stream._pending:
                pieces += await anext(stream)
        if not stream.finished:
            stream.take(delta([], "length"))
        pieces += await rest(stream)
        text = "".join(piece.text for piece in pieces)
        found = [(TEXT.find(one) + len(one), TEXT.find(one)) for one in stop if one in TEXT]
        expected = TEXT[: min(found)[0 if include else 1]] if found else TEXT
        assert text == expected == stream.so_far().outputs[0].text
        assert [t for piece in pieces for t in piece.token_ids] == sent
        assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop" if found else "length"]
        assert pieces[-1].finish_reason and stream.ends == 1

    run(work())


def test_no_character_and_no_stop_string_shows_before_it_is_whole():
    async def work():
        stream, seen = Recorded(SamplingParams(max_tokens=200, stop=["stop there"])), ""
        for token in TOKENS:
            if not stream.finished:
                stream.take(delta([token]))
                seen += "".join(piece.text for piece in await anext(stream))
                assert TEXT.startswith(seen) and "\ufffd" not in seen and "stop the" not in seen
        assert seen == TEXT[: TEXT.index("stop there")]
        assert stream.aborted == [0]

    run(work())


def test_a_reader_that_is_slow_gets_one_piece_with_everything():
    async def work():
        stream = Recorded(SamplingParams(max_tokens=2000, n=2, temperature=1.0))
        for _ in range(300):
            for token in TOKENS:
                stream.take(delta([token], index=1))
        stream.take(delta(TOKENS, index=0))
        pieces = await anext(stream)
        assert [(p.index, len(p.token_ids)) for p in pieces] == [(1, 300 * len(TOKENS)), (0, len(TOKENS))]

    run(work())


def test_an_end_token_has_no_text_unless_it_is_wanted():
    async def work(include):
        stream = Recorded(SamplingParams(stop_token_ids=[TOKENS[3]], include_stop_str_in_output=include))
        stream.take(delta(TOKENS[:4], "stop", TOKENS[3]))
        (piece,) = await rest(stream)
        assert (piece.token_ids, piece.stop_reason) == (TOKENS[:4], TOKENS[3])
        return piece.text

    assert run(work(True)) == TOKENIZER.decode(TOKENS[:4])
    assert run(work(False)) == TOKENIZER.decode(TOKENS[:3])


def test_one_of_several_sequences_stops_alone_and_what_comes_later_is_dropped():
    async def work():
        stream = Recorded(SamplingParams(n=2, temperature=1.0, max_tokens=200, stop=["stop"]))
        stream.take(delta(TOKENS, index=1))
        stream.take(delta(TOKENS, index=1))
        assert (stream.aborted, stream.finished) == ([1], False)
        stream.take(delta(TOKENS[:2], "length", index=0, preemptions=3))
        outputs = stream.so_far().outputs
        assert [(o.finish_reason, o.stop_reason) for o in outputs] == [("length", None), ("stop", "stop")]
        assert outputs[1].token_ids == TOKENS
        assert (stream.ends, stream.preemptions) == (1, 3)

    run(work())


def test_cancelling_ends_once_with_the_text_so_far():
    async def work():
        stream = Recorded(SamplingParams(n=2, temperature=1.0, max_tokens=200))
        stream.take(delta(TOKENS[:3], "length", index=0))
        stream.take(delta(TOKENS[:2], index=1))
        async with stream:
            stream.cancel("client is gone")
            stream.cancel()
            stream.take(delta(TOKENS, "length", index=1))
            stream.fail(EngineError("too late"))
        pieces = await rest(stream)
        assert [(p.index, p.finish_reason, p.stop_reason) for p in pieces] == [
            (0, "length", None),
            (1, "abort", "client is gone"),
        ]
        assert pieces[1].text == TOKENIZER.decode(TOKENS[:2])
        assert (stream.aborted, stream.ends) == ([ALL], 1)

    run(work())


def test_a_dead_engine_is_one_error_after_what_had_arrived():
    async def work():
        stream = Recorded(SamplingParams(max_tokens=200))
        stream.take(delta(TOKENS[:2]))
        stream.fail(EngineError("died", 2.0))
        stream.fail(EngineError("died twice"))
        assert (await anext(stream))[0].token_ids == TOKENS[:2]
        with pytest.raises(EngineError, match=r"^died$"):
            await anext(stream)
        assert await rest(stream) == []
        assert stream.ends == 1

    run(work())


def test_a_request_that_could_not_be_queued_ends_all_of_its_sequences():
    async def work():
        stream = Recorded(SamplingParams(n=3, temperature=1.0))
        stream.take(delta([], "error", "what was wrong", index=ALL))
        assert [(p.index, p.finish_reason, p.stop_reason) for p in await rest(stream)] == [
            (i, "error", "what was wrong") for i in range(3)
        ]

    run(work())


def test_waiting_readers_wake_up_and_output_wakes_once():
    async def work():
        stream = Recorded(SamplingParams(max_tokens=200))
        reader = asyncio.create_task(rest(stream))
        whole = Recorded(SamplingParams(max_tokens=200))
        answer = asyncio.create_task(whole.output())
        for one in (stream, whole):
            await asyncio.sleep(0)
            one.take(delta(TOKENS[:5], logprobs=[RANKED] * 5, queued=0.25))
            await asyncio.sleep(0)
            one.take(delta(TOKENS[5:6], "length", logprobs=[RANKED]))
        text = "".join(piece.text for piece in await reader)
        output = await answer
        assert output.outputs[0].text == text == TOKENIZER.decode(TOKENS[:6])
        assert output.finished and output.prompt_token_ids == PROMPT
        assert whole.queued == 0.25
        assert output.metrics.arrival_time <= output.metrics.first_token_time <= output.metrics.finished_time

    run(work())


RANKED = Ranked(TOKENS[0], -0.5, 1, [TOKENS[0], 5], [-0.5, -1.0])


def test_a_request_that_begins_again_has_forgotten_the_first_attempt():
    async def work():
        stream = Recorded(SamplingParams(max_tokens=200, logprobs=1, prompt_logprobs=1))
        stream.take(delta([], prompt_logprobs=(1, [RANKED, RANKED])))
        stream.take(delta(TOKENS[:2], logprobs=[RANKED, RANKED], queued=9.0))
        stream.begin_again()
        stream.take(delta([], prompt_logprobs=(1, [RANKED])))
        stream.take(delta([], prompt_logprobs=(2, [RANKED])))
        stream.take(delta([TOKENS[0]], "length", logprobs=[RANKED]))
        output = await stream.output()
        assert output.outputs[0].token_ids == [TOKENS[0]]
        assert output.outputs[0].cumulative_logprob == -0.5
        assert len(output.prompt_logprobs) == 3 and output.prompt_logprobs[0] is None

    run(work())
