"""The messages between the API's process and the engine's."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core import wire
from phase4_scheduler.core.deltas import _VALUES_AT_ONCE, parcels
from phase4_scheduler.request_checks import differing

RANKED = wire.Ranked(7, -0.5, 2, [3, 7], [-0.25, -0.5])
INFO = wire.Info("m", 64, 320, [0, 2], 8, 256, 32, 16, "float32", "cpu", 10, 20, "phase4: solution")


@pytest.mark.parametrize(
    ("message", "decode"),
    [
        (wire.Add("1", [1, 2], {"temperature": 0.5, "stop": ("a", "b")}, 2**62, -3, 1.5), wire.decode_request),
        (wire.Add("1", [1]), wire.decode_request),
        (wire.Abort(["1", "2.3"], "stop"), wire.decode_request),
        (
            wire.Outputs([wire.Delta("1", 0, [5], [RANKED], (1, [RANKED]), "stop", 5, 0.1, 2)], wire.Stats(running=3)),
            wire.decode_outputs,
        ),
        (wire.Outputs([wire.Delta("1", 0, [], finish_reason="stop", stop_reason="\n")]), wire.decode_outputs),
        (wire.Hello(INFO, 123, 0.5), wire.decode_from_engine),
        (wire.Pulse(10**12), wire.decode_from_engine),
        (wire.Fault("out of memory", True), wire.decode_from_engine),
        (wire.Stop(), wire.decode_to_engine),
    ],
)
def test_every_message_comes_out_as_it_went_in(message, decode):
    found = decode(wire.encode(message))
    assert type(found) is type(message)
    assert wire.encode(found) == wire.encode(message)


def test_a_message_of_an_older_sender_has_the_new_fields_at_their_defaults():
    old = msgspec.msgpack.encode(["add", "1", [1, 2]])
    assert wire.decode_request(old) == wire.Add("1", [1, 2])


@pytest.mark.parametrize("frame", [["hello"], ["nonsense", 1], ["add", 1, [1]], ["add", "1", ["x"]], {"a": 1}, 7])
def test_what_is_no_request_is_refused(frame):
    with pytest.raises(msgspec.DecodeError):
        wire.decode_request(msgspec.msgpack.encode(frame))


SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 4),
        "temperature": st.floats(0.1, 2.0),
        "top_k": st.integers(-1, 50),
        "top_p": st.floats(0.1, 1.0),
        "stop": st.lists(st.text(min_size=1), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 1000), max_size=3),
        "ignore_eos": st.booleans(),
        "max_tokens": st.none() | st.integers(8, 100),
        "min_tokens": st.integers(0, 8),
        "seed": st.none() | st.integers(0, 2**63 - 1),
        "logprobs": st.none() | st.integers(-1, 20),
        "skip_special_tokens": st.booleans(),
    },
)


@settings(max_examples=50, deadline=None)
@given(SAMPLING)
def test_sampling_parameters_survive_the_way(given):
    params = SamplingParams(**given)
    message = wire.decode_request(wire.encode(wire.Add("1", [1], differing(params))))
    assert SamplingParams.from_dict(message.params) == params


def test_parameters_that_are_default_cost_no_bytes():
    assert differing(SamplingParams(temperature=0.5)) == {"temperature": 0.5}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2 * _VALUES_AT_ONCE // 3), max_size=6))
def test_large_steps_are_cut_into_messages_of_a_bounded_size_in_order(sizes):
    ids = [0] * (2 * _VALUES_AT_ONCE)
    deltas = [wire.Delta(str(i), 0, [1], [wire.Ranked(1, 0.0, 1, ids[:size], [])]) for i, size in enumerate(sizes)]
    parts = list(parcels(deltas))
    assert [d.request_id for part in parts for d in part] == [str(i) for i in range(len(sizes))]
    assert all(sum(len(d.logprobs[0].top_ids) for d in part) <= _VALUES_AT_ONCE for part in parts if len(part) > 1)
