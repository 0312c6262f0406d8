"""How many blocks there are: arithmetic by hand on a model of TinyLlama's shape, on a CPU and on a GPU of 80 GB."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.config import load_config
from phase0_prototype.errors import UserError
from phase0_prototype.hub import SHIPPED
from phase0_prototype.kv_spec import KVSpec
from phase1_memory.engine_config import PagedConfig
from phase1_memory.memory_plan import Memory, MemoryPlan, activation_bytes, memory_of, plan_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = KVSpec(num_layers=22, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16)
TOKEN = 22 * 2 * 4 * 64 * 2  # bytes: 22528
BLOCK = 16 * TOKEN  # 360448
GB = 10**9
ACTIVATIONS = 8192 * (3 * 5632 + 3 * 2048) * 2 + 256 * 32000 * (4 + 2)


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(
        load_config(SHIPPED["titan-tiny"]),
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        max_position_embeddings=2048,
    )


@pytest.fixture(scope="module")
def plan(model):
    """The plan for these settings on a device with so much memory."""

    def make(free, *, total=None, device=CPU, **config):
        memory = Memory(free if total is None else total, free)
        return plan_memory(PagedConfig("tinyllama", **config), model, SPEC, device, memory)

    return make


def refused(plan, *named, **arguments):
    with pytest.raises(UserError) as caught:
        plan(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for name in named:
        assert name in message, message


def test_a_cpu_gives_half_of_what_is_free(plan):
    assert plan(10 * GB) == MemoryPlan(num_blocks=5 * GB // BLOCK, max_model_len=2048, block_bytes=BLOCK)


def test_no_more_than_all_sequences_can_ever_use(plan):
    assert plan(1000 * GB).num_blocks == 256 * 2048 // 16
    assert plan(1000 * GB, max_num_seqs=3, max_model_len=100).num_blocks == 3 * 7
    assert plan(1000 * GB, max_num_seqs=1, block_size=48).num_blocks == 43, "2048 tokens are 42.7 blocks of 48"


def test_a_gpu_gives_its_share_without_weights_and_activations(plan):
    """2 GB are in use, by the weights and by others; 90 % of 80 GB may be."""
    made = plan(78 * GB, total=80 * GB, device=CUDA, max_num_seqs=4096)
    assert made.num_blocks == (72 * GB - 2 * GB - ACTIVATIONS) // BLOCK
    half = plan(78 * GB, total=80 * GB, device=CUDA, max_num_seqs=4096, gpu_memory_utilization=0.5)
    assert half.num_blocks == (40 * GB - 2 * GB - ACTIVATIONS) // BLOCK


def test_activations_are_the_feed_forward_block_and_a_few_hundred_rows_of_logits(model):
    assert activation_bytes(model, 8192, 2) == ACTIVATIONS
    assert activation_bytes(model, 10, 4) == 10 * (3 * 5632 + 3 * 2048) * 4 + 10 * 32000 * 8


def test_smaller_steps_leave_more_blocks(plan):
    given = {"free": 6 * GB, "total": 8 * GB, "device": CUDA}
    assert plan(**given, max_num_batched_tokens=512).num_blocks > plan(**given).num_blocks


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_was_asked_for_is_what_one_gets(plan, device):
    given = {"free": 10 * GB, "total": 80 * GB, "device": device}
    assert plan(**given, num_blocks=1000).num_blocks == 1000
    assert plan(**given, num_blocks=GB // BLOCK, block_size=1).block_bytes == TOKEN
    assert plan(**given, kv_cache_memory_bytes=GB).num_blocks == GB // BLOCK
    assert plan(**given, kv_cache_memory_bytes=GB, block_size=64).num_blocks == GB // (4 * BLOCK)


def test_the_context_is_cut_to_the_memory_unless_it_was_asked_for(plan):
    assert plan(10 * GB, num_blocks=20) == MemoryPlan(20, 320, BLOCK)
    assert plan(10 * GB, num_blocks=20, max_model_len=320) == MemoryPlan(20, 320, BLOCK)
    refused(
        plan, "max_model_len 321", "21 blocks", "has 20", "lower max_model_len", "num_blocks",
        free=10 * GB, num_blocks=20, max_model_len=321,
    )  # fmt: skip


def test_the_context_is_at_most_8192_unless_more_is_asked_for(model):
    long = dataclasses.replace(model, max_position_embeddings=131072)

    def length(**config):
        return plan_memory(PagedConfig("m", **config), long, SPEC, CPU, Memory(100 * GB, 100 * GB)).max_model_len

    assert length() == 8192
    assert length(max_model_len=100_000) == 100_000


def test_more_than_the_models_positions_is_refused(plan):
    refused(plan, "max_model_len 2049", "2048", "lower it", free=10 * GB, max_model_len=2049)


def test_more_than_is_free_is_refused_with_the_numbers(plan):
    refused(plan, "30000 blocks of 16 tokens", "10.81 GB", "10.00 GB are free on cpu", "lower num_blocks",
            free=10 * GB, num_blocks=30000)  # fmt: skip
    refused(plan, "12.00 GB of KV cache", "10.00 GB are free on cuda", "lower num_blocks or kv_cache_memory_bytes",
            free=10 * GB, total=80 * GB, device=CUDA, kv_cache_memory_bytes=12 * GB)  # fmt: skip
    assert plan(10 * GB, num_blocks=10 * GB // BLOCK).num_blocks == 27743
    refused(plan, "27744 blocks", free=10 * GB, num_blocks=10 * GB // BLOCK + 1)


def test_weights_that_do_not_fit_are_named_before_the_cache(plan):
    refused(plan, "tinyllama does not fit", "1.5 GB", "smaller model", free=-3 * GB // 2, total=4 * GB)


def test_weights_that_do_not_fit_are_compared_to_what_is_free_and_not_to_all_memory(plan):
    """Of 4 GB some are in use by others: "4.0 GB are free" would be a lie."""
    with pytest.raises(UserError) as caught:
        plan(free=-3 * GB // 2, total=4 * GB)
    assert not re.search(r"4\.0 GB of this cpu have free", str(caught.value))


def test_less_than_a_block_is_refused(plan):
    refused(plan, "has 0", "kv_cache_memory_bytes", free=10 * GB, kv_cache_memory_bytes=BLOCK - 1)
    refused(plan, "has 0", "gpu_memory_utilization", free=82 * GB // 10, total=80 * GB, device=CUDA)


def test_on_a_cpu_the_remedy_is_not_a_share_of_a_gpu(plan):
    with pytest.raises(UserError) as caught:
        plan(free=4 * BLOCK, max_model_len=2048)
    assert "gpu_memory_utilization" not in str(caught.value)


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "block_size": st.integers(1, 300),
        "max_model_len": st.integers(1, 2048),
        "max_num_seqs": st.integers(1, 500),
        "gpu_memory_utilization": st.floats(0.01, 1),
        "num_blocks": st.integers(1, 10**5),
    },
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(CONFIGS, st.integers(0, 20 * GB), st.integers(0, 60 * GB), st.sampled_from([CPU, CUDA]))
def test_a_plan_fits_in_what_is_free_and_holds_its_longest_sequence(plan, config, free, used, device):
    try:
        made = plan(free, total=free + used, device=device, **config)
    except UserError as error:
        assert "\n" not in str(error)
        return
    page = config.get("block_size", 16)
    assert made.block_bytes == TOKEN * page
    assert made.num_blocks >= 1 and made.num_blocks * made.block_bytes <= free
    assert 1 <= made.max_model_len <= min(2048, made.num_blocks * page)
    assert made.max_model_len == config.get("max_model_len", made.max_model_len)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(BLOCK * 4, 20 * GB), st.integers(0, GB), st.sampled_from([CPU, CUDA]))
def test_more_memory_never_gives_less_cache(plan, free, more, device):
    def tokens(size):
        try:
            return plan(size, total=2 * size, device=device, gpu_memory_utilization=1.0).num_blocks
        except UserError:
            return 0

    assert tokens(free) <= tokens(free + more)


def test_on_a_cpu_the_weights_are_not_in_memory_yet():
    some = memory_of(CPU, 0)
    less = memory_of(CPU, 10**15)
    assert 0 < some.free <= some.total
    assert less.free < 0 < less.total


# Settings


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 16.0}, "block_size=16.0"),
        ({"block_size": None}, "block_size=None"),
        ({"num_blocks": -1}, "num_blocks=-1"),
        ({"num_blocks": True}, "num_blocks=True"),
        ({"num_blocks": "10"}, "num_blocks='10'"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes=0"),
        ({"kv_cache_memory_bytes": "4GB"}, "kv_cache_memory_bytes='4GB'"),
        ({"num_blocks": 4, "kv_cache_memory_bytes": GB}, "num_blocks and kv_cache_memory_bytes"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization=1.01"),
        ({"gpu_memory_utilization": 90}, "gpu_memory_utilization=90"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan"),
        ({"watermark": 1}, "watermark=1"),
        ({"watermark": -0.1}, "watermark=-0.1"),
        ({"watermark": None}, "watermark=None"),
        ({"preemption": "drop"}, "preemption='drop'"),
        ({"preemption": None}, "preemption=None"),
        ({"preemption": ["swap"]}, "preemption=['swap']"),
        ({"allocator": "c"}, "allocator='c'"),
        ({"swap_bytes": -1}, "swap_bytes=-1"),
        ({"swap_bytes": None}, "swap_bytes=None"),
        ({"offload_bytes": 1.5}, "offload_bytes=1.5"),
        ({"offload_dir": "/tmp"}, "offload_dir='/tmp'"),
        ({"offload_dir": 5, "preemption": "swap"}, "offload_dir=5"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"num_block": 5}, "did you mean num_blocks?"),
        ({"page_size": 5}, "'page_size' is not a setting"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_that_names_them(given, named):
    with pytest.raises(UserError) as caught:
        PagedConfig.of("titan-tiny", given)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_block_size_of_none_is_no_size():
    assert PagedConfig("m").block_size == 16
    assert PagedConfig("m", num_blocks=None).num_blocks is None
    assert PagedConfig("m").max_seqs == 256 and PagedConfig("m", max_num_seqs=3).max_seqs == 3
