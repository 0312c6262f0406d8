"""The engine's side, turned by hand: real sockets, a real scheduler, no model."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from phase0_prototype.seeds import derive_seed
from phase0_prototype.step import NO_TOKEN
from phase1_memory.allocator import make_allocator
from phase4_scheduler.core import wire
from phase4_scheduler.core.channels import ClientChannels, EngineChannels, private_directory
from phase4_scheduler.core.core import EngineCore
from phase4_scheduler.core.deltas import ALL
from phase4_scheduler.loop import AheadLoop, Loop
from phase4_scheduler.memory import CountedMemory
from phase4_scheduler.null_executor import NullExecutor
from phase4_scheduler.scheduler import Scheduler
from phase4_scheduler.scheduler_config import SchedulerConfig
from phase4_scheduler.tests.engines import PATIENCE

TEXT = tuple(range(100, 150))  # token i of an answer is TEXT[(seed + i) % 50]
INFO = wire.Info("null", 256, 1000, [], 8, 64, 128, 16, "none", "none")


class Engine:
    """An `EngineCore`, and the client's ends of its sockets."""

    def __init__(self, directory, context, executor, loop, config, blocks):
        self.blocks = blocks
        memory = CountedMemory(make_allocator(blocks), INFO.block_size)
        self.client = ClientChannels(context, directory)
        self.channels = EngineChannels(directory)
        self.core = EngineCore(loop(Scheduler(memory, config), executor), INFO, self.channels)
        while not self.client.writable():
            time.sleep(0.001)
        self.outputs = []
        self.control = []

    def turn(self, times=1):
        for _ in range(times):
            self.core.turn()
            self.read()

    def read(self):
        while self.client._outputs.poll(1):
            self.outputs.append(wire.decode_outputs(self.client._outputs.recv()))
        while self.client._control.poll(0):
            self.control.append(wire.decode_from_engine(self.client._control.recv()))

    def send(self, *messages):
        for message in messages:
            self.client.send_request(message)
        assert self.channels._requests.poll(PATIENCE * 1000)

    def turn_until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end
            self.turn()

    def deltas(self, request_id=None):
        return [d for o in self.outputs for d in o.deltas if request_id in (None, d.request_id)]

    def finished(self, *request_ids):
        return all(any(d.finish_reason for d in self.deltas(i)) for i in request_ids)

    def empty(self):
        scheduler = self.core.loop.scheduler
        return scheduler.kv.num_free == self.blocks and not (
            self.core._open or self.core._groups or self.core._unseen or self.core._queued
        )


@pytest.fixture
def make():
    """Makes engines."""
    context, made = zmq.Context(), []

    def one(executor=None, loop=Loop, blocks=INFO.num_blocks, **config):
        holder = private_directory()
        given = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **config})
        engine = Engine(Path(holder.name), context, executor or NullExecutor(0.0, 0.0, TEXT), loop, given, blocks)
        made.append((engine, holder))
        return engine

    yield one
    for engine, holder in made:
        engine.client.close()
        engine.channels.close()
        holder.cleanup()
    context.destroy(linger=0)


@pytest.mark.parametrize("loop", [Loop, AheadLoop])
def test_each_token_is_told_once_and_the_end_with_the_last(make, loop):
    engine = make(loop=loop)
    engine.send(wire.Add("0", [1] * 100, {"max_tokens": 5}, seed=3))
    engine.turn_until(lambda: engine.finished("0"))
    deltas = engine.deltas("0")
    assert [t for d in deltas for t in d.token_ids] == [103, 104, 105, 106, 107]
    assert [d.finish_reason for d in deltas] == [None] * 4 + ["length"]
    assert [d.queued is None for d in deltas] == [False] + [True] * 4
    assert deltas[0].queued >= 0
    engine.turn_until(engine.empty)


def test_sequences_of_one_prompt_share_it_and_can_be_aborted_one_by_one(make):
    engine = make()
    engine.send(wire.Add("0", [1] * 40, {"n": 3, "max_tokens": 200}, seed=5))
    engine.turn_until(lambda: len(engine.deltas("0")) >= 30)
    for index in range(3):
        seed = 5 if index == 0 else derive_seed(5, index)  # each makes choices of its own
        assert [t for d in engine.deltas("0") if d.index == index for t in d.token_ids][:9] == [
            TEXT[(seed + k) % len(TEXT)] for k in range(9)
        ]
    engine.send(wire.Abort(["0.1"], "stop"))
    engine.turn(2)
    engine.outputs.clear()
    engine.turn(2)
    assert {d.index for d in engine.deltas("0")} == {0, 2}
    engine.send(wire.Abort(["0", "unknown", "7.3"]))
    engine.turn_until(engine.empty)
    engine.outputs.clear()
    engine.turn()
    assert engine.deltas() == []


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (wire.Add("bad", [1], {"temperature": 9}), "temperature"),
        (wire.Add("bad", [1], {"temprature": 1}), "temprature"),
        (wire.Add("bad", []), "0 tokens"),
        (wire.Add("bad", [5000]), "0..999"),
        (wire.Add("bad", [-1]), "0..999"),
        (wire.Add("bad", [1] * 256), "256 tokens"),
    ],
)
def test_a_bad_request_ends_alone(make, bad, what):
    engine = make()
    engine.send(wire.Add("good", [1], {"max_tokens": 4}), bad)
    engine.turn_until(lambda: engine.finished("good", "bad"))
    (refused,) = engine.deltas("bad")
    assert (refused.index, refused.finish_reason) == (ALL, "error")
    assert what in refused.stop_reason
    assert len(engine.deltas("good")) == 4
    engine.turn_until(engine.empty)


def test_an_id_in_use_is_dropped_and_does_not_touch_its_owner(make, caplog):
    engine = make()
    engine.send(wire.Add("0", [1], {"max_tokens": 4}), wire.Add("0", [1, 2], {"max_tokens": 9}))
    engine.turn_until(lambda: engine.finished("0"))
    engine.turn_until(engine.empty)
    assert len(engine.deltas("0")) == 4
    assert "in use" in caplog.text


class Unlucky(NullExecutor):
    """No token can be chosen for a request with this seed after three."""

    def collect(self, launched):
        done = super().collect(launched)
        bad = [r.seed == 13 and len(r.output_token_ids) == 3 for r in done.requests]
        chosen = [NO_TOKEN if is_bad else t for is_bad, t in zip(bad, done.token_ids, strict=True)]
        return replace(done, token_ids=chosen)


@pytest.mark.parametrize("loop", [Loop, AheadLoop])
def test_a_request_without_a_next_token_ends_alone(make, loop):
    engine = make(Unlucky(0.0, 0.0, TEXT), loop)
    engine.send(wire.Add("bad", [1], {"max_tokens": 9}, seed=13), wire.Add("good", [1], {"max_tokens": 9}, seed=1))
    engine.turn_until(lambda: engine.finished("good", "bad"))
    last = engine.deltas("bad")[-1]
    assert (len(engine.deltas("bad")), last.token_ids, last.finish_reason) == (4, [], "error")
    assert "NaN" in last.stop_reason
    assert [t for d in engine.deltas("good") for t in d.token_ids] == list(range(101, 110))
    engine.turn_until(engine.empty)


def test_a_request_whose_time_is_over_is_told_so(make):
    engine = make(NullExecutor(0.01, 0.0, TEXT))
    engine.send(wire.Add("0", [1], {"max_tokens": 200}, timeout=0.1), wire.Add("1", [1], {"max_tokens": 3}))
    engine.turn_until(lambda: engine.finished("0", "1"))
    last = engine.deltas("0")[-1]
    assert (last.finish_reason, last.stop_reason) == ("abort", "deadline")
    assert engine.deltas("1")[-1].finish_reason == "length"
    engine.turn_until(engine.empty)


def test_preempted_sequences_go_on_and_their_losses_are_counted(make):
    engine = make(blocks=70)  # of 128
    for i in range(8):
        engine.send(wire.Add(str(i), [1] * 100, {"max_tokens": 155}, seed=i))
    engine.turn_until(lambda: engine.finished(*map(str, range(8))))
    for i in range(8):
        assert [t for d in engine.deltas(str(i)) for t in d.token_ids] == [TEXT[(i + k) % 50] for k in range(155)]
    told = sum(d.preemptions for d in engine.deltas())
    assert told == engine.core.loop.scheduler.preemptions > 0
    engine.turn_until(engine.empty)


def test_statistics_add_up_and_are_told_when_the_engine_rests(make):
    engine = make()
    for i in range(3):
        engine.send(wire.Add(str(i), [1] * 50, {"max_tokens": 7}))
    engine.turn_until(lambda: engine.finished("0", "1", "2"))
    engine.outputs.clear()
    engine.turn_until(lambda: any(o.stats for o in engine.outputs))
    (stats,) = [o.stats for o in engine.outputs if o.stats]
    assert (stats.running, stats.waiting, stats.swapped, stats.waiting_tokens) == (0, 0, 0, 0)
    assert (stats.prompt_tokens, stats.generated_tokens) == (150, 21)
    assert stats.batch_tokens == 150 + 18  # the last token of a sequence is not computed
    assert stats.kv_blocks_free == stats.kv_blocks == INFO.num_blocks
    assert stats.steps <= stats.batch_seqs <= stats.batch_tokens
    assert 0 <= stats.busy_seconds <= stats.elapsed_seconds


def test_the_loop_pulses_while_it_rests_and_while_it_works(make):
    engine = make(NullExecutor(0.02, 0.0, TEXT))
    engine.core.pulse = 0.05
    engine.turn_until(lambda: len(engine.control) >= 3)
    engine.send(wire.Add("0", [1], {"max_tokens": 50}))
    engine.turn_until(lambda: engine.finished("0"))
    steps = [message.steps for message in engine.control]
    assert len(set(steps)) >= 5  # of a second of steps
    assert steps == sorted(steps)


def test_a_batch_that_is_held_back_is_waited_for_and_not_spun_on(make):
    engine = make(batch_size=4, batch_wait=0.3)
    engine.send(wire.Add("0", [1], {"max_tokens": 1}))
    began = time.monotonic()
    turns = 0
    while not engine.finished("0"):
        engine.turn()
        turns += 1
    assert time.monotonic() - began >= 0.25
    assert turns < 20


def test_an_unknown_failure_of_the_loop_is_not_swallowed(make):
    class Broken(NullExecutor):
        def collect(self, launched):
            raise RuntimeError("the device fell off the bus")

    engine = make(Broken(0.0))
    engine.send(wire.Add("0", [1]))
    with pytest.raises(RuntimeError, match="fell off"):
        engine.turn_until(lambda: engine.finished("0"))


def test_prompt_logprobs_come_in_parts_of_a_bounded_size(monkeypatch):
    import torch

    from phase0_prototype.logprobs import logprobs_of
    from phase4_scheduler.core import deltas

    monkeypatch.setattr(deltas, "_VALUES_AT_ONCE", 100)
    logits = torch.randn(23, 40, generator=torch.Generator().manual_seed(0))
    found = logprobs_of(logits, torch.arange(23), -1)
    request = SimpleNamespace(params=SimpleNamespace(prompt_logprobs=-1), index=0, group="0", request_id="0")
    parts = list(deltas.of_prompt(request, 1, found))
    assert [start for start, _ in (d.prompt_logprobs for d in parts)] == list(range(1, 24, 2))
    rows = [row for d in parts for row in d.prompt_logprobs[1]]
    expected = torch.log_softmax(logits, -1)
    for i, row in enumerate(rows):
        assert row.token_id == i and math.isclose(row.logprob, expected[i, i].item(), abs_tol=1e-6)
        assert row.rank == 1 + int((expected[i] > expected[i, i]).sum())
        assert row.top_ids == expected[i].argsort(descending=True).tolist()
