"""Sockets that anything may be written to (ShadowMQ and relatives: frames that were unpickled ran code)."""

from __future__ import annotations

import asyncio
import random
import socket
import stat
from pathlib import Path

import pytest
import zmq

from phase4_scheduler.core import wire
from phase4_scheduler.core.channels import ClientChannels, EngineChannels, private_directory
from phase4_scheduler.tests.engines import run, until

NAMES = ("requests", "outputs", "control")


def garbage(seed: int) -> list[bytes]:
    """Random bytes, and valid messages that were cut, changed or sent the wrong way."""
    rng = random.Random(seed)
    good = [
        wire.encode(wire.Add("1", [1, 2, 3], {"temperature": 0.5})),
        wire.encode(wire.Outputs([wire.Delta("1", 0, [5])], wire.Stats())),
        wire.encode(wire.Hello(wire.Info("m", 1, 1, [], 1, 1, 1, 1, "", ""), 1, 1.0)),
    ]
    frames = [rng.randbytes(rng.randrange(200)) for _ in range(100)]
    for frame in good:
        frames += [frame[: rng.randrange(len(frame))] for _ in range(10)]
        for _ in range(30):
            changed = bytearray(frame)
            changed[rng.randrange(len(frame))] = rng.randrange(256)
            frames.append(bytes(changed))
    return [*frames, b"\x91" * 5000, b"", b"\xdd\xff\xff\xff\xff"]  # a deep nest, nothing, an array of 4G elements


@pytest.fixture
def pair():
    """Both ends, in a loop; and the directory."""

    async def make(work):
        context = zmq.Context()
        with private_directory() as directory:
            client, engine = ClientChannels(context, Path(directory)), EngineChannels(Path(directory))
            try:
                return await work(client, engine, Path(directory), context)
            finally:
                client.close()
                engine.close()
                context.destroy(linger=0)

    return lambda work: run(make(work))


def test_the_directory_is_private_and_its_sockets_can_be_addressed(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for place in (None, str(long)):
        monkeypatch.setattr("tempfile.tempdir", place)
        with private_directory() as directory:
            assert stat.S_IMODE(Path(directory).stat().st_mode) == 0o700
            assert len(str(Path(directory) / "1234" / "requests")) < 104
        assert not Path(directory).exists()


def test_messages_arrive_in_order_both_ways(pair):
    async def work(client, engine, directory, context):
        outputs, control = [], []
        client.listen(outputs.append, control.append)
        await until(client.writable)
        for i in range(500):
            assert client.send_request(wire.Add(str(i), [1]))
            engine.send_outputs(wire.Outputs([wire.Delta(str(i), 0, [1])]))
        engine.send_control(wire.Pulse(1))
        client.send_stop()
        await until(lambda: len(outputs) == 500 and control)
        assert [o.deltas[0].request_id for o in outputs] == [str(i) for i in range(500)]
        requests = []

        def take():
            requests.extend(engine.requests())
            return len(requests) == 500

        await until(take)
        assert [r.request_id for r in requests] == [str(i) for i in range(500)]
        await until(engine.stopped)

    pair(work)


def test_garbage_in_every_socket_disturbs_nobody(pair, caplog):
    async def work(client, engine, directory, context):
        outputs, control = [], []
        client.listen(outputs.append, control.append)
        await until(client.writable)
        rogue = context.socket(zmq.PUSH)  # somebody of the same user who found the sockets
        rogue.connect(f"ipc://{directory / 'outputs'}")
        for frame in garbage(1):
            client._requests.send(frame)
            engine._control.send(frame)
            rogue.send(frame)
            client._control.send(frame)
        for name in NAMES:
            for seed in range(5):
                with socket.socket(socket.AF_UNIX) as raw:  # not even ZeroMQ
                    raw.settimeout(5)
                    raw.connect(str(directory / name))
                    raw.sendall(random.Random(seed).randbytes(2000))
        client.send_request(wire.Abort(["last"]))
        engine.send_control(wire.Pulse(77))
        requests = []

        def both_ends_live():
            requests.extend(engine.requests())
            engine.stopped()
            return wire.Abort(["last"]) in requests and wire.Pulse(77) in control

        await until(both_ends_live)
        engine.send_outputs(wire.Outputs([wire.Delta("after", 0, [1])]))
        await until(lambda: any(d.request_id == "after" for o in outputs for d in o.deltas))
        rogue.close()

    pair(work)
    assert "dropped a frame" in caplog.text


def test_a_client_that_nobody_reads_refuses_instead_of_waiting():
    async def work():
        context = zmq.Context()
        with private_directory() as directory:
            client = ClientChannels(context, Path(directory))
            assert not client.writable()
            assert not client.send_request(wire.Add("1", [1]))
            client.close()
        context.destroy(linger=0)

    run(work())


def test_many_messages_at_once_leave_turns_for_others(pair):
    async def work(client, engine, directory, context):
        outputs, turns = [], 0
        client.listen(outputs.append, lambda message: None)
        for _ in range(5000):
            engine.send_outputs(wire.Outputs([]))
        await asyncio.sleep(0)
        while len(outputs) < 5000:
            before = len(outputs)
            await asyncio.sleep(0)
            turns += len(outputs) > before
        assert turns >= 5000 // 64 // 2  # a turn reads 64 of them, and with what has arrived meanwhile at most 128

    pair(work)
