"""The frequencies of all rope types against `transformers`, in bits, and what parameters are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from phase0_prototype.config import RopeConfig
from phase0_prototype.errors import ConfigError
from phase2_rope.scaling import SCALINGS, Frequencies, dynamic_inv_freq, mscale, rotated_dims

CONTEXT = 4096
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "long_factor": [1.0 + 0.5 * i for i in range(32)],
    "original_max_position_embeddings": 1024,
}
PUBLISHED: dict[str, tuple[str, float, int, dict[str, Any]]] = {  # type, theta, head_dim, parameters
    "Llama 2": ("default", 10000.0, 128, {}),
    "GLM-4, half of each head": ("default", 10000.0, 128, {"partial_rotary_factor": 0.5}),
    "LongChat": ("linear", 10000.0, 128, {"factor": 8.0}),
    "Llama 3.1": ("llama3", 500000.0, 128, {**LLAMA3, "original_max_position_embeddings": 8192}),
    "Llama 3.2": ("llama3", 500000.0, 64, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}),
    "Qwen2.5 with YaRN": ("yarn", 1e6, 128, {"factor": 4.0, "original_max_position_embeddings": 32768}),
    "DeepSeek-V3": (
        "yarn",
        10000.0,
        64,
        {**YARN, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "DeepSeek-V2-Lite": ("yarn", 10000.0, 64, {**YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.5}),
    "gpt-oss": ("yarn", 150000.0, 64, {**YARN, "factor": 32.0, "truncate": False}),
    "attention factor given": ("yarn", 10000.0, 64, {**YARN, "attention_factor": 1.25}),
    "factor left to the contexts": ("yarn", 10000.0, 64, {"factor": None, "original_max_position_embeddings": 1024}),
    "Phi-3": ("longrope", 10000.0, 64, LONGROPE),
    "Phi-4, three quarters": ("longrope", 10000.0, 64, {**LONGROPE, "partial_rotary_factor": 0.75}),
    "longrope with a factor": ("longrope", 10000.0, 64, {**LONGROPE, "factor": 32.0}),
    "longrope with both": ("longrope", 10000.0, 64, {**LONGROPE, "factor": 2.0, "attention_factor": 1.5}),
    "longrope that is not longer": ("longrope", 10000.0, 64, {**LONGROPE, "factor": 1.0}),
    "InternLM 2.5": ("dynamic", 1e6, 128, {"factor": 2.0}),
    "whole factor": ("dynamic", 10000.0, 64, {"factor": 3}),
}


def fitted(parameters: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The same, lists as long as there are pairs."""
    pairs = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
    return {key: value[:pairs] if isinstance(value, list) else value for key, value in parameters.items()}


def expected(kind: str, theta: float, head_dim: int, parameters: dict[str, Any], length: Any) -> tuple[Any, float]:
    """What `transformers` makes of it; for "default", which its table lacks, linear by 1."""
    if kind == "default":
        kind, parameters = "linear", {**parameters, "factor": 1.0}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)


def ours(kind: str, theta: float, head_dim: int, parameters: dict[str, Any], length: int = 0) -> Frequencies:
    return SCALINGS[kind](RopeConfig(kind, theta, parameters), head_dim, CONTEXT, length)


def same(found: Frequencies, wanted: tuple[torch.Tensor, float]) -> bool:
    return torch.equal(found.inv_freq, wanted[0]) and found.attention_factor == wanted[1]


@pytest.mark.parametrize("length", [1, 1024, 1025, CONTEXT, CONTEXT + 1, 100_000])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_are_those_of_transformers_bit_for_bit(name, length):
    kind, theta, head_dim, parameters = PUBLISHED[name]
    parameters = fitted(parameters, head_dim)
    found = ours(kind, theta, head_dim, parameters, length)
    assert found.inv_freq.dtype == torch.float32
    assert found.inv_freq.shape == (int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2,)
    # the forward pass of transformers hands in a tensor, but for the first frequencies
    wanted_length = length if length <= CONTEXT or kind != "dynamic" else torch.tensor(length)
    assert same(found, expected(kind, theta, head_dim, parameters, wanted_length))


def test_every_type_is_tested():
    assert {kind for kind, *_ in PUBLISHED.values()} == set(SCALINGS)


THETA = st.floats(500.0, 1e7)
EVEN = st.integers(2, 96).map(lambda n: 2 * n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(theta=THETA, dims=EVEN, factor=st.floats(1.0, 64.0), length=st.integers(1, 1 << 20))
def test_dynamic_for_any_length(theta, dims, factor, length):
    found = ours("dynamic", theta, dims, {"factor": factor}, length)
    wanted = expected("dynamic", theta, dims, {"factor": factor}, torch.tensor(length))
    torch.testing.assert_close(found.inv_freq, wanted[0], rtol=1e-6, atol=1e-8)  # the last bits of pow
    base = theta * (factor * max(length, CONTEXT) / CONTEXT - (factor - 1)) ** (dims / (dims - 2))
    exact = [base ** (-2 * i / dims) for i in range(dims // 2)]
    torch.testing.assert_close(found.inv_freq.double(), torch.tensor(exact, dtype=torch.float64), rtol=2e-5, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    theta=THETA,
    dims=EVEN,
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 4.0),
    more=st.floats(0.1, 8.0),
    original=st.integers(16, 8192),
)
def test_llama3_for_any_parameters(theta, dims, factor, low, more, original):
    parameters = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + more,
        "original_max_position_embeddings": original,
    }
    wanted, _ = expected("llama3", theta, dims, parameters, None)
    torch.testing.assert_close(ours("llama3", theta, dims, parameters).inv_freq, wanted, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    theta=THETA,
    dims=EVEN,
    factor=st.floats(1.0, 64.0),
    betas=st.tuples(st.integers(2, 64), st.integers(1, 2)),
    truncate=st.booleans(),
    scales=st.tuples(*[st.none() | st.floats(0.1, 2.0)] * 2),
    given_factor=st.none() | st.floats(0.1, 2.0),
    original=st.integers(16, 32768),
)
def test_yarn_for_any_parameters(theta, dims, factor, betas, truncate, scales, given_factor, original):
    parameters = {
        "factor": factor,
        "beta_fast": betas[0],
        "beta_slow": betas[1],
        "truncate": truncate,
        "mscale": scales[0],
        "mscale_all_dim": scales[1],
        "attention_factor": given_factor,
        "original_max_position_embeddings": original,
    }
    assert same(ours("yarn", theta, dims, parameters), expected("yarn", theta, dims, parameters, None))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    theta=THETA,
    factors=st.lists(st.tuples(st.floats(1.0, 80.0), st.floats(1.0, 80.0)), min_size=2, max_size=48),
    factor=st.none() | st.floats(0.5, 64.0),
    original=st.integers(16, 8192),
    length=st.integers(1, 16384),
)
def test_longrope_for_any_parameters(theta, factors, factor, original, length):
    parameters = {
        "short_factor": [short for short, _ in factors],
        "long_factor": [long for _, long in factors],
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    dims = 2 * len(factors)
    found = ours("longrope", theta, dims, parameters, length)
    assert same(found, expected("longrope", theta, dims, parameters, length))


def test_a_table_of_dynamic_lengths_holds_what_each_length_gives_alone():
    rope = RopeConfig("dynamic", 10000.0, {"factor": 2.0})
    table = dynamic_inv_freq(rope, 64, CONTEXT, torch.arange(CONTEXT - 1, CONTEXT + 40))
    assert table.shape == (41, 32)
    for row in (0, 1, 2, 17, 40):
        alone = SCALINGS["dynamic"](rope, 64, CONTEXT, CONTEXT - 1 + row).inv_freq
        torch.testing.assert_close(table[row], alone, rtol=1e-6, atol=0)  # pow of a vector and of one number


def test_what_each_type_does_to_fast_and_slow_pairs():
    """The claims of the module's docstring: the ratio to unscaled frequencies, from the fastest pair to the slowest."""
    plain = ours("default", 10000.0, 64, {}).inv_freq
    linear = ours("linear", 10000.0, 64, {"factor": 4.0}).inv_freq / plain
    assert torch.allclose(linear, torch.full_like(linear, 0.25))
    for kind, parameters in (("yarn", YARN), ("llama3", {**LLAMA3, "factor": 4.0})):
        ratio = ours(kind, 10000.0, 64, parameters).inv_freq / plain
        assert ratio[0] == 1 and abs(ratio[-1] - 0.25) < 1e-6
        assert (ratio[:-1] - ratio[1:] > -1e-6).all() and ((ratio > 0.26) & (ratio < 0.99)).any()
    dynamic = ours("dynamic", 10000.0, 64, {"factor": 4.0}, 2 * CONTEXT).inv_freq / plain
    assert dynamic[0] == 1 and abs(dynamic[-1] - 1 / 5) < 1e-6  # 4 * 2 - 3 = 5 times the wavelength
    assert (dynamic[:-1] > dynamic[1:]).all()


def test_mscale_is_the_temperature_of_the_paper():
    assert mscale(1.0) == mscale(0.5) == 1.0
    assert mscale(40.0, 0.707) == pytest.approx(0.1 * 0.707 * math.log(40) + 1)
    assert mscale(40.0) ** 2 == pytest.approx(1.8739, abs=1e-4)  # DeepSeek-V3's


@pytest.mark.parametrize(
    ("kind", "parameters", "words"),
    [
        ("linear", {}, "factor is None"),
        ("linear", {"factor": -2.0}, "factor is -2.0"),
        ("linear", {"factor": True}, "factor is True"),
        ("linear", {"factor": 0}, "factor is 0"),
        ("dynamic", {"factor": "2"}, "factor is '2'"),
        ("dynamic", {"factor": 2.0, "partial_rotary_factor": 2 / 64}, "at least 4 rotated dims"),
        ("llama3", {**LLAMA3, "low_freq_factor": None}, "low_freq_factor is None"),
        ("llama3", {**LLAMA3, "high_freq_factor": 1.0}, "more than low_freq_factor = 1.0"),
        ("llama3", {**LLAMA3, "original_max_position_embeddings": math.inf}, "is inf"),
        ("yarn", {"factor": 4.0}, "original_max_position_embeddings is None"),
        ("yarn", {**YARN, "beta_fast": -1}, "beta_fast is -1"),
        ("yarn", {**YARN, "attention_factor": [1.0]}, "attention_factor is a list of 1"),
        ("longrope", {**LONGROPE, "short_factor": [1.0] * 31}, "short_factor is a list of 31, expected a list of 32"),
        ("longrope", {**LONGROPE, "long_factor": [0.0] * 32}, "long_factor is a list of 32, expected"),
        ("longrope", {**LONGROPE, "long_factor": 4.0}, "long_factor is 4.0"),
        ("longrope", {**LONGROPE, "original_max_position_embeddings": 1}, "more than 1"),
        ("default", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("default", {"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
        ("default", {"partial_rotary_factor": 0.3}, "even and at least 2, not 19"),
    ],
)
def test_senseless_parameters_are_one_line_that_names_them(kind, parameters, words):
    with pytest.raises(ConfigError) as error:
        ours(kind, 10000.0, 64, parameters)
    message = str(error.value)
    assert words in message and repr(kind) in message and "\n" not in message and len(message) < 200


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_what_reads_the_context_says_so_where_there_is_none(kind):
    parameters = {"dynamic": {"factor": 2.0}, "yarn": {**YARN, "factor": None}, "longrope": LONGROPE}[kind]
    with pytest.raises(ConfigError, match=f"'{kind}' needs max_position_embeddings"):
        SCALINGS[kind](RopeConfig(kind, 10000.0, parameters), 64, None, 0)


def test_yarn_needs_frequencies_that_differ():
    with pytest.raises(ConfigError, match="rope_theta is 1"):
        ours("yarn", 1.0, 64, YARN)


def test_partial_rotary_turns_the_first_dims():
    assert rotated_dims(RopeConfig("default", 1e4, {"partial_rotary_factor": 0.25}), 80) == 20
    assert rotated_dims(RopeConfig("default", 1e4, {}), 80) == 80
