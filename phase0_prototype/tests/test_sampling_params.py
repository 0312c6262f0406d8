"""A parameter that is unknown or wrong gets one line that names it; everything else is vLLM's."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import ParameterError, SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.logprobs, params.prompt_logprobs) == (None, None)
    assert params.skip_special_tokens and not params.ignore_eos and not params.include_stop_str_in_output


def test_unknown_fields_are_named_with_the_nearest_known_one():
    nearest = r"^temprature is not a sampling parameter: did you mean temperature\?$"
    with pytest.raises(ParameterError, match=nearest):
        SamplingParams(temprature=0.5)
    with pytest.raises(ParameterError, match=nearest):
        SamplingParams.from_dict({"temprature": 0.5})
    with pytest.raises(ParameterError, match=r"^xyzzy is not .* known are n, temperature, .*skip_special_tokens$"):
        SamplingParams.from_dict({"xyzzy": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, 2.1, math.nan, math.inf, "1", None, True, [1.0])],
        *[("top_p", value) for value in (0, -1, 1.01, math.nan, "a")],
        *[("min_p", value) for value in (-0.01, 1.5, math.nan)],
        *[("top_k", value) for value in (-2, 1.5, "5", None, True)],
        *[("n", value) for value in (0, -1, 20000, 1.0, None)],
        *[("repetition_penalty", value) for value in (0, -1, 101, math.nan)],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)],
        *[("max_tokens", value) for value in (0, -1, 1.5, "many")],
        *[("min_tokens", value) for value in (-1, None, 17)],
        *[("seed", value) for value in (-1, 2**63, 0.5)],
        *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-2, True, 1.0)],
        *[("stop", value) for value in ("", ["a", ""], 5, [1], b"x", {"a": 1})],
        *[("stop_token_ids", value) for value in (5, [-1], ["a"], [True], [1.0], "12")],
        *[("ignore_eos", value) for value in (0, 1, None, "yes")],
    ],
)
def test_bad_values_are_named_with_what_is_allowed(field, value):
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}={value!r}") and "give " in message and "\n" not in message
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, UserError)


def test_edges_of_the_ranges_are_allowed():
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=2**63 - 1)
    SamplingParams(temperature=2, top_p=1e-9, min_tokens=16, logprobs=-1, max_tokens=None, stop=None)


def test_numbers_of_numpy_become_pythons():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(5), top_p=1)
    assert type(params.temperature) is type(params.top_p) is float and type(params.top_k) is int


def test_stop_is_a_tuple_however_it_is_given():
    assert SamplingParams(stop="ab").stop == SamplingParams(stop=["ab", "ab"]).stop == ("ab",)
    assert SamplingParams(stop_token_ids=[3, 3, 1]).stop_token_ids == (3, 1)


def test_values_are_given_by_name():
    with pytest.raises(ParameterError, match="by name"):
        SamplingParams(0.5)
    with pytest.raises(ParameterError, match="mapping"):
        SamplingParams.from_dict([("temperature", 1.0)])


def test_several_greedy_outputs_would_be_equal():
    with pytest.raises(ParameterError, match=r"n=2 .*temperature"):
        SamplingParams(n=2, temperature=0)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ParameterError) as caught:
        SamplingParams(temperature="x" * 10_000)
    assert len(str(caught.value)) < 200


def test_it_is_a_value():
    params = SamplingParams(temperature=0.5, stop=["a"])
    assert params.greedy is False  # cached: must not show in comparisons
    assert (
        pickle.loads(pickle.dumps(params))
        == copy.deepcopy(params)
        == params
        == SamplingParams.from_dict(dataclasses.asdict(params))
    )
    assert len({params, SamplingParams(temperature=0.5, stop=["a"])}) == 1
    assert dataclasses.replace(params, temperature=0.0).greedy
    with pytest.raises(ParameterError, match="top_p=5"):
        dataclasses.replace(params, top_p=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0


def test_help_shows_the_parameters():
    names = list(inspect.signature(SamplingParams).parameters)
    assert names == [field.name for field in dataclasses.fields(SamplingParams)]


def test_plain_means_that_the_models_own_largest_logit_decides():
    assert SamplingParams(temperature=0, top_p=0.5, stop="x", max_tokens=None).plain
    for field, value in [
        ("temperature", 0.1), ("repetition_penalty", 1.1), ("presence_penalty", -1), ("frequency_penalty", 1),
        ("min_tokens", 1), ("logprobs", 0),
    ]:  # fmt: skip
        assert not SamplingParams(**{"temperature": 0, field: value}).plain


def test_commands_can_import_it_without_torch():
    code = "import sys, phase0_prototype.sampling_params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
