"""Engines that die, hang or never come, under load; the client stays up, and every request ends exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from phase0_prototype.errors import UserError
from phase4_scheduler.async_llm import AsyncLLM, EngineError, Supervision
from phase4_scheduler.tests.engines import PATIENCE, PROMPT, null_llm, run, tokens, until

IMPATIENT = Supervision(hang_timeout=0.6, hang_grace=0.3, grace=0.2)  # for tests of hanging only


async def read(stream):
    """All that a reader sees: tokens, and how it ended."""
    seen, ends = [], []
    try:
        async for pieces in stream:
            for piece in pieces:
                seen += piece.token_ids
                ends += [piece.finish_reason] if piece.finish_reason else []
    except EngineError as error:
        ends.append(error)
    return seen, ends


def test_a_killed_engine_is_replaced_while_its_client_stays_up():
    async def work():
        async with null_llm() as llm:
            first = llm.pid
            expected = (await llm.generate(PROMPT, tokens(200, seed=7))).outputs[0].token_ids
            streams = [llm.submit(PROMPT, tokens(200, seed=7)) for _ in range(8)]
            readers = [asyncio.create_task(read(stream)) for stream in streams[:4]]  # the others are not looked at yet
            await until(lambda: all(stream.taken for stream in streams[:4]))
            os.kill(first, signal.SIGKILL)
            results = await asyncio.gather(*readers)
            assert all(len(ends) == 1 and isinstance(ends[0], EngineError) for _, ends in results)
            assert all(seen == expected[: len(seen)] and 0 < len(seen) < 200 for seen, _ in results)
            assert "SIGKILL" in str(results[0][1][0]) and results[0][1][0].retry_after >= 1
            for stream in streams[4:]:  # whose readers had seen nothing: the next engine answers
                assert await read(stream) == (expected, ["length"])
            await llm.ready(PATIENCE)
            assert llm.pid != first and llm.restarts == 1 and llm.in_flight == 0
            assert (await llm.generate(PROMPT, tokens(5, seed=7))).outputs[0].token_ids == expected[:5]

    run(work())


def test_requests_are_refused_with_a_time_to_come_back_until_the_next_engine_is_there():
    async def work():
        async with null_llm() as llm:
            os.kill(llm.pid, signal.SIGKILL)
            await until(lambda: llm.state == "restarting")
            with pytest.raises(EngineError, match="restarting") as refused:
                llm.submit(PROMPT, tokens(1))
            assert refused.value.retry_after >= 1
            await llm.ready(PATIENCE)
            await llm.generate(PROMPT, tokens(1))

    run(work())


def test_a_stopped_engine_counts_as_hung_and_lives_on_if_it_comes_back():
    async def work():
        async with null_llm(supervision=Supervision(hang_timeout=0.8, hang_grace=300.0)) as llm:
            first, answer = llm.pid, asyncio.create_task(llm.generate(PROMPT, tokens(300)))
            await asyncio.sleep(0)
            os.kill(first, signal.SIGSTOP)
            await until(lambda: llm.state == "hung")
            with pytest.raises(EngineError, match="hung"):
                llm.submit(PROMPT, tokens(1))
            os.kill(first, signal.SIGCONT)
            await until(lambda: llm.state == "ready")
            assert len((await answer).outputs[0].token_ids) == 300
            assert llm.pid == first and llm.restarts == 0

    run(work())


def test_an_engine_whose_step_never_ends_is_replaced_and_its_request_is_not_tried_for_ever():
    async def work():
        async with null_llm(supervision=IMPATIENT, step_seconds=600.0) as llm:
            first = llm.pid
            with pytest.raises(EngineError, match="hangs"):
                await llm.generate(PROMPT, tokens(2))
            assert llm.restarts == 1  # it was given to a second engine, and not to a third
            assert not psutil.pid_exists(first)

    run(work())


def test_a_deadline_holds_though_the_engine_hangs():
    async def work():
        async with null_llm(supervision=Supervision(grace=0.2), step_seconds=600.0) as llm:
            output = await llm.generate(PROMPT, tokens(2), timeout=0.1)
            assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("abort", "deadline")

    run(work())


def test_a_crash_loop_opens_the_breaker_and_a_probe_closes_it():
    async def work():
        patience = Supervision(max_restarts=1, pause=1.0, longest_pause=1.0)
        async with null_llm(supervision=patience) as llm:
            waiting = llm.submit(PROMPT, tokens(8000))
            for _ in range(2):
                await until(lambda: llm.state == "ready")
                before = llm.pid
                os.kill(before, signal.SIGKILL)
                await until(lambda before=before: llm.pid != before)
            await until(lambda: llm.state == "broken")
            _, ends = await read(waiting)
            assert isinstance(ends[0], EngineError)
            with pytest.raises(EngineError, match=r"broken: .*SIGKILL"):
                llm.submit(PROMPT, tokens(1))
            with pytest.raises(EngineError, match="SIGKILL"):
                await llm.ready(PATIENCE)
            await until(lambda: llm.state == "ready")  # the probe
            await llm.generate(PROMPT, tokens(1))

    run(work())


def test_an_engine_that_never_comes_is_given_up():
    async def work():
        patience = Supervision(start_timeout=0.05, max_restarts=1, pause=60.0)
        llm = AsyncLLM("null", supervision=patience)
        await llm.start()
        with pytest.raises(EngineError, match=r"not ready in 0\.05 s"):
            await llm.ready(PATIENCE)
        assert llm.state == "broken" and llm.restarts == 1
        await llm.shutdown()

    run(work())


@pytest.mark.parametrize(
    ("model", "settings", "what"),
    [
        ("no/such-model-anywhere/at-all", {}, "neither a directory"),
        ("null", {"step_second": 1}, "did you mean step_seconds"),
        ("null", {"scheduling_policy": "lifo"}, "scheduling_policy='lifo'"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_not_tried_again(model, settings, what, capfd):
    async def work():
        llm = AsyncLLM(model, settings)
        await llm.start()
        with pytest.raises(UserError, match=what) as told:
            await llm.ready(PATIENCE)
        assert "\n" not in str(told.value)
        await until(lambda: llm.state == "broken")
        with pytest.raises(EngineError) as refused:
            llm.submit(PROMPT, tokens(1))
        assert refused.value.retry_after is None
        await llm.shutdown()
        assert llm.restarts == 0

    run(work())
    assert "Traceback" not in capfd.readouterr().err


def test_what_the_engine_writes_is_passed_on(capfd):
    async def work():
        async with null_llm() as llm:
            llm._supervisor._process.channels._control.send(b"\xc1 no message")
            text = ""

            def passed_on():
                nonlocal text
                text += capfd.readouterr().err
                return "dropped a frame" in text

            await until(passed_on)

    run(work())


def test_signals_for_everybody_leave_the_engine_to_its_client():
    """A service manager that stops a service signals all of its processes; what runs is to be finished."""

    async def work():
        async with null_llm() as llm:
            answer = asyncio.create_task(llm.generate(PROMPT, tokens(100)))
            await asyncio.sleep(0)
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(llm.pid, number)
            assert len((await answer).outputs[0].token_ids) == 100
            assert llm.restarts == 0

    run(work())


@pytest.mark.parametrize("when", ["starting", "ready", "working", "hung", "stopped"])
def test_after_shutdown_nothing_is_left(when, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("phase4_scheduler.core.channels._LONGEST_PATH", 1000 if len(str(tmp_path)) < 60 else 100)

    async def work():
        step = 600.0 if when == "hung" else 0.005
        llm = AsyncLLM("null", {"step_seconds": step}, supervision=Supervision(grace=0.5))
        await llm.start()
        reader = None
        if when != "starting":
            await llm.ready(PATIENCE)
        if when in ("working", "hung"):
            reader = asyncio.create_task(read(llm.submit(PROMPT, tokens(5000))))
            await asyncio.sleep(0.1)
        if when == "stopped":
            await llm.shutdown()
        await until(lambda: llm.pid or when == "stopped")
        pid = llm.pid
        began = time.monotonic()
        await llm.shutdown()
        assert time.monotonic() - began < PATIENCE / 2
        assert llm.state == "stopped" and llm.in_flight == 0
        assert pid is None or not psutil.pid_exists(pid)
        if reader is not None:
            assert (await reader)[1] == ["abort"]
        with pytest.raises(EngineError, match="stopped"):
            llm.submit(PROMPT, tokens(1))

    run(work())
    assert list(Path(tmp_path).iterdir()) == []


def test_shutdown_waits_for_what_runs_as_long_as_it_was_told():
    async def work():
        async with null_llm() as llm:
            short, long = llm.submit(PROMPT, tokens(50)), llm.submit(PROMPT, tokens(8000))
            readers = [asyncio.create_task(read(stream)) for stream in (short, long)]
            closing = asyncio.create_task(llm.shutdown(timeout=5.0))
            await asyncio.sleep(0)
            with pytest.raises(EngineError, match="stopping"):
                llm.submit(PROMPT, tokens(1))
            assert (await readers[0])[1] == ["length"]
            assert not closing.done()
            await llm.shutdown()  # no longer
            assert (await readers[1])[1] == ["abort"]
            await closing

    run(work())


def test_an_engine_that_rests_takes_no_processor_time():
    async def work():
        async with null_llm() as llm:
            process = psutil.Process(llm.pid)
            await asyncio.sleep(0.2)
            before = sum(process.cpu_times()[:2])
            await asyncio.sleep(1.5)
            assert sum(process.cpu_times()[:2]) - before < 0.1

    run(work())
