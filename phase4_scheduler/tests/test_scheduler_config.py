"""Settings that can't be are refused in one line, with what, which value and the remedy."""

from __future__ import annotations

import dataclasses
import math

import pytest

from phase0_prototype.errors import UserError
from phase4_scheduler.null_engine import NullConfig, build_null
from phase4_scheduler.scheduler_config import SchedulerConfig

WRONG = {
    "max_num_seqs": [0, -1, 2.5, True, "8", None],
    "max_num_batched_tokens": [0, 1e3, "many"],
    "enable_chunked_prefill": ["yes", None, 2],
    "long_prefill_token_threshold": [-1, 0.5, False],
    "step_priority": ["first", "", None, 1],
    "scheduling_policy": ["lifo", "FCFS", None],
    "ageing_rate": [-1.0, math.nan, math.inf, "fast", True],
    "preemption": ["kill", None],
    "watermark": [-0.1, math.nan, "1%"],
    "batch_size": [0, 1.5],
    "batch_wait": [-1, math.inf, None],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]
OF_NULL = [
    ("step_seconds", -1),
    ("step_seconds", 4000),
    ("token_seconds", "slow"),
    ("max_model_len", 0),
    ("block_size", 1.5),
    ("num_blocks", True),
    ("swap_blocks", -3),
    ("swap_blocks", "all"),
    ("async_scheduling", "maybe"),
]


def test_every_setting_has_a_wrong_value_here():
    assert set(WRONG) == {field.name for field in dataclasses.fields(SchedulerConfig)}


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_wrong_value_is_named_in_one_line(name, value):
    for make in (lambda: SchedulerConfig(**{name: value}), lambda: build_null({name: value})):
        with pytest.raises(UserError) as error:
            make()
        message = str(error.value)
        assert message.startswith(f"{name}={value!r} is not allowed: give ") and "\n" not in message


@pytest.mark.parametrize(("name", "value"), OF_NULL)
def test_so_are_the_settings_of_the_engine_without_a_model(name, value):
    with pytest.raises(UserError) as error:
        build_null({name: value})
    assert str(error.value).startswith(f"{name}={value!r} ") and "\n" not in str(error.value)


def test_ageing_that_does_not_age_is_refused():
    with pytest.raises(UserError, match=r"ageing_rate=0 would never let a long request in: give more than 0"):
        SchedulerConfig(scheduling_policy="ageing", ageing_rate=0)
    SchedulerConfig(scheduling_policy="fcfs", ageing_rate=0)


def test_an_unknown_setting_is_named_with_the_next_best():
    with pytest.raises(UserError, match=r"'max_num_sequences' is not a setting.*did you mean max_num_seqs\?"):
        NullConfig.of({"max_num_sequences": 3})
    with pytest.raises(UserError, match=r"'colour' is not a setting of the model 'null': choose from "):
        NullConfig.of({"colour": 3})


def test_a_cache_that_does_not_hold_one_sequence_is_refused():
    with pytest.raises(UserError, match=r"num_blocks=3 of 16 tokens don't hold .* max_model_len=64: raise num_blocks"):
        build_null({"num_blocks": 3, "max_model_len": 64})
    assert build_null({"num_blocks": 4, "max_model_len": 64}).config.blocks == 4
    assert build_null({"max_num_seqs": 3, "max_model_len": 65}).config.blocks == 3 * 5


@pytest.mark.parametrize(("name", "value"), [*CASES, ("async_scheduling", "maybe")])
def test_the_engines_settings_are_checked_alike(name, value):
    from phase4_scheduler.engine_config import ServingConfig

    if (name, value) in [("max_num_seqs", None), ("max_num_batched_tokens", 0)]:
        return  # chosen by the engine
    with pytest.raises(UserError) as error:
        ServingConfig("titan-tiny", device="cpu", **{name: value})
    assert name in str(error.value) and repr(value) in str(error.value) and "\n" not in str(error.value)


def test_the_budget_of_a_step_is_chosen_by_device():
    from phase4_scheduler.engine_config import ServingConfig

    assert ServingConfig("titan-tiny", device="cpu").scheduling.max_num_batched_tokens == 256
    made = ServingConfig("titan-tiny", device="cpu", max_num_seqs=5, batch_wait=0.5, preemption="swap").scheduling
    assert (made.max_num_seqs, made.batch_wait, made.preemption) == (5, 0.5, "swap")
