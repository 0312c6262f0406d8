"""Cosines and sines against `transformers` and float64, and that a request's are its own in any batch."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from phase0_prototype.batch import Batch
from phase0_prototype.config import RopeConfig
from phase0_prototype.errors import ConfigError
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase2_rope.rotary import Rotary

CPU = torch.device("cpu")
THETA, HEAD_DIM, CONTEXT, LONGEST = 10000.0, 32, 48, 120
TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 12},
    "dynamic": {"factor": 2.5},
    "longrope": {
        "short_factor": [1.0 + 0.02 * i for i in range(16)],
        "long_factor": [1.0 + 0.7 * i for i in range(16)],
        "original_max_position_embeddings": 20,
    },
}
BY_LENGTH = ("dynamic", "longrope")


def make(kind: str, dtype: torch.dtype = torch.float32, *, longest: int = LONGEST, **more: Any) -> Rotary:
    rope = RopeConfig(kind, THETA, {**TYPES[kind], **more})
    return Rotary(rope, HEAD_DIM, longest, dtype, CPU, context=CONTEXT)


def oracle(kind: str) -> LlamaRotaryEmbedding:
    """A fresh one of `transformers`: it remembers the longest text that it has seen."""
    parameters = {"rope_type": kind, "rope_theta": THETA, **TYPES[kind]}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * HEAD_DIM,
            num_attention_heads=4,
            head_dim=HEAD_DIM,
            max_position_embeddings=CONTEXT,
            rope_parameters=parameters,
        )
    )


def halves(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """cos and sin of `transformers`, [1, T, R] each with every number twice, as [T, R]: cosines, then sines."""
    cos, sin = (side[0] for side in pair)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:])
    return torch.cat((cos[:, :half], sin[:, :half]), dim=-1)


def batch_of(*pieces: tuple[int, int, int]) -> Batch:
    """A batch of (prompt length, first position, number of tokens)."""
    scheduled = []
    for prompt, start, count in pieces:
        request = Request(f"r{len(scheduled)}", [0] * prompt, SamplingParams(), 0, (), 10**6)
        request.output_token_ids = [0] * max(0, start + count - prompt)
        scheduled.append(ScheduledRequest(request, start, count))
    return Batch.build(Step(tuple(scheduled)), [tuple(range(9)) for _ in pieces], 16, CPU)


def rows(rotary: Rotary, batch: Batch) -> torch.Tensor:
    """[T, R]: what the tokens of a batch are turned by."""
    cos, sin = rotary(rotary.places(batch))
    assert cos.shape == sin.shape == (batch.num_tokens, 1, HEAD_DIM // 2)
    assert cos.dtype == sin.dtype == rotary.dtype
    return torch.cat((cos, sin), dim=-1)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prompt", [1, 19, 20, 21, 40, CONTEXT - 1, CONTEXT, CONTEXT + 1, 70])
@pytest.mark.parametrize("kind", TYPES)
def test_one_request_is_turned_as_by_generate_of_transformers(kind, prompt, dtype):
    """The prompt in one pass, then token by token, across every length at which a type changes its mind."""
    theirs, ours, like = oracle(kind), make(kind, dtype), torch.empty((), dtype=dtype)
    wanted = halves(theirs(like, torch.arange(prompt)[None]))
    assert torch.equal(rows(ours, batch_of((prompt, 0, prompt))), wanted)
    for position in range(prompt, LONGEST):
        wanted = halves(theirs(like, torch.tensor([[position]])))
        found = rows(ours, batch_of((prompt, position, 1)))
        if kind == "dynamic":  # pow of a table and of one number differ in the last bit
            torch.testing.assert_close(found, wanted, atol=LONGEST * 2.0**-22 + torch.finfo(dtype).eps, rtol=0)
        else:
            assert torch.equal(found, wanted)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("kind", TYPES)
def test_neighbours_chunks_and_recomputation_change_nothing(kind, data):
    """What a token is turned by depends on its position and its own prompt; equal in every bit."""
    rotary = make(kind)
    prompt = data.draw(st.integers(1, LONGEST - 1), "prompt")
    tokens = data.draw(st.integers(prompt, LONGEST), "tokens")
    alone = torch.cat([rows(rotary, batch_of((prompt, position, 1))) for position in range(tokens)])
    cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=4), "cuts")})
    for start, end in itertools.pairwise(cuts):  # chunks, or all again in one: after a preemption
        pieces = data.draw(
            st.lists(st.tuples(st.integers(1, 100), st.integers(0, 99), st.integers(1, 20)), max_size=3), "neighbours"
        )
        place = data.draw(st.integers(0, len(pieces)), "place")
        before = sum(count for _, _, count in pieces[:place])
        mixed = batch_of(*pieces[:place], (prompt, start, end - start), *pieces[place:])
        assert torch.equal(rows(rotary, mixed)[before : before + end - start], alone[start:end])


def test_a_long_neighbour_would_change_the_answer_of_transformers():
    """Why `places` exists: the oracle turns both requests of a batch for the longer one."""
    for kind in BY_LENGTH:
        alone = halves(oracle(kind)(torch.empty(()), torch.arange(8)[None]))
        theirs = oracle(kind)
        both = torch.stack((torch.arange(8), torch.arange(90, 98)))
        cos, _ = theirs(torch.empty(()), both)
        assert (cos[0, :, : HEAD_DIM // 2] - alone[:, : HEAD_DIM // 2]).abs().max() > 0.05
        assert torch.equal(rows(make(kind), batch_of((8, 0, 8), (98, 90, 8)))[:8], alone)


def test_dynamic_of_transformers_remembers_an_earlier_text_and_ours_does_not():
    theirs, ours, like = oracle("dynamic"), make("dynamic"), torch.empty(())
    theirs(like, torch.arange(110)[None])
    stale = halves(theirs(like, torch.arange(60)[None]))  # longer than the context, shorter than what came before
    fresh = halves(oracle("dynamic")(like, torch.arange(60)[None]))
    rows(ours, batch_of((110, 0, 110)))
    found = rows(ours, batch_of((60, 0, 60)))
    assert (stale - fresh).abs().max() > 0.05
    torch.testing.assert_close(found, fresh, atol=LONGEST * 2.0**-22, rtol=0)
    reset = halves(theirs(like, torch.arange(CONTEXT - 1)[None]))  # below the context they agree again
    assert torch.equal(rows(ours, batch_of((CONTEXT - 1, 0, CONTEXT - 1))), reset)


def test_longrope_holds_no_row_twice_that_nobody_reads():
    assert make("longrope").cos_sin.shape == (20 + LONGEST, HEAD_DIM)
    assert make("longrope", longest=20).cos_sin.shape == (20, HEAD_DIM)  # nobody can get to the long list


def test_positions_up_to_131072_are_as_good_as_float32_angles_can_be():
    """The float32 frequency is off by a few 2^-24 of itself, the product by 2^-24: at p radians, p times that."""
    longest = 131072
    rotary = Rotary(RopeConfig("default", 500000.0), 128, longest, torch.float32, CPU)
    positions = torch.cat((torch.arange(0, longest, 997), torch.arange(longest - 64, longest)))
    inv_freq = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    angles = positions.double()[:, None] * inv_freq
    exact = torch.cat((angles.cos(), angles.sin()), dim=-1)
    bound = angles.repeat(1, 2) * 2.0**-24 * 6 + 2.0**-23
    found = rotary.cos_sin[positions].double()
    assert ((found - exact).abs() <= bound).all()
    assert (found - exact).abs().max() > 1e-4  # float32 does lose something: 0.0095 rad at most
    rounded = positions.bfloat16().double()[:, None] * inv_freq  # what bfloat16 positions would do
    assert (rounded.cos() - angles.cos()).abs().max() > 1.9
    assert torch.tensor(257.0).bfloat16() == 256


def test_neighbouring_positions_are_told_apart_at_any_distance():
    """What RoPE is for: the fastest pair turns by one radian from a position to the next, also at the end."""
    rotary = Rotary(RopeConfig("default", 500000.0), 128, 131072, torch.float32, CPU)
    cos, sin = rotary.cos_sin[-1000:, 0].double(), rotary.cos_sin[-1000:, 64].double()
    steps = torch.atan2(sin, cos).diff() % (2 * math.pi)
    assert (steps - 1).abs().max() < 0.02


def test_the_attention_factor_is_in_cos_and_sin():
    plain, scaled = make("yarn", attention_factor=1.0), make("yarn", attention_factor=1.5)
    torch.testing.assert_close(scaled.cos_sin, plain.cos_sin * 1.5)
    length = scaled.cos_sin.unflatten(-1, (2, -1)).norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 1.5))


def test_partial_rotary_gives_rows_of_the_rotated_dims():
    assert make("default", partial_rotary_factor=0.25).cos_sin.shape == (LONGEST, HEAD_DIM // 4)


@pytest.mark.parametrize("kind", TYPES)
def test_where_no_length_matters_positions_are_the_rows(kind):
    """Static types, and the others where no text is long enough: nothing is computed or copied."""
    longest = {"longrope": 20, "dynamic": CONTEXT}.get(kind, LONGEST)
    rotary, batch = make(kind, longest=longest), batch_of((9, 0, 9), (3, longest - 1, 1))
    assert rotary.places(batch) is batch.positions
    assert torch.equal(rows(rotary, batch), rows(make(kind), batch))


@pytest.mark.parametrize("kind", TYPES)
def test_last_tokens_of_a_batch_have_their_own_rows(kind):
    rotary, batch = make(kind), batch_of((70, 0, 70), (8, 0, 8), (5, 99, 1))
    batch = replace(batch, last=(0, 1, 2), logits_rows=torch.tensor([69, 77, 78]))
    assert torch.equal(rows(rotary, batch.last_tokens()), rows(rotary, batch)[[69, 77, 78]])


@pytest.mark.parametrize("kind", TYPES)
def test_forward_is_compiled_without_a_break(kind):
    rotary = make(kind, torch.bfloat16)
    places = rotary.places(batch_of((70, 0, 70), (5, 99, 1)))
    compiled = torch.compile(rotary.forward, fullgraph=True, backend="aot_eager")(places)
    assert all(map(torch.equal, compiled, rotary(places)))


def test_unknown_types_are_named_with_those_that_there_are():
    with pytest.raises(ConfigError, match="'mrope' is not supported: there are default, linear, dynamic, yarn"):
        Rotary(RopeConfig("mrope", THETA), HEAD_DIM, LONGEST, torch.float32, CPU)
