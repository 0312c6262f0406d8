"""The cache's contract: rows are dense, a row that moves takes its keys and values along, nothing leaks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.kv_spec import KVPart, KVSpec
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams

CPU = torch.device("cpu")
ROWS, LENGTH = 4, 8


@pytest.fixture
def kv(part):
    module = part("kv_cache")
    return module.KVCache(module.KVSpec(2, 1, 2, torch.float32), ROWS, LENGTH, CPU)


def request(name="r", length=3) -> Request:
    return Request(name, list(range(length)), SamplingParams(), 0, (), 5)


def keeps(kv) -> bool:
    """Whether this cache keeps what is written; the one that the course starts with does not (task 0.1)."""
    return kv.computed(request(), 3) == 3


def write(kv, owner, value):
    """Mark every computed token of a sequence in every layer."""
    (row,) = kv.blocks(owner)
    for layer in range(kv.spec.num_layers):
        for side, tensor in enumerate(kv.layer(layer)):
            tensor[row, : owner.num_computed_tokens] = value + 100 * layer + 10 * side


def holds(kv, owner, value) -> bool:
    (row,) = kv.blocks(owner)
    return all(
        bool((tensor[row, : owner.num_computed_tokens] == value + 100 * layer + 10 * side).all())
        for layer in range(kv.spec.num_layers)
        for side, tensor in enumerate(kv.layer(layer))
    )


def test_a_token_costs_keys_and_values_in_every_layer(part):
    spec = part("kv_cache").KVSpec(num_layers=22, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16)
    assert spec.bytes_per_token == 22 * 2 * 4 * 64 * 2  # TinyLlama: 22.5 kB


def test_what_is_kept_otherwise_is_counted_as_it_is_kept():
    parts = (KVPart((4, 64), torch.float8_e4m3fn), KVPart((4, 64), torch.float8_e4m3fn), KVPart((4,), torch.float32))
    spec = KVSpec(num_layers=22, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16, kept=parts)
    assert spec.bytes_per_token == 22 * (4 * 64 + 4 * 64 + 4 * 4)
    assert spec.parts == parts


def test_requests_take_the_next_free_row(kv):
    owners = [request(str(i)) for i in range(ROWS)]
    for i, owner in enumerate(owners):
        assert kv.num_free == ROWS - i
        kv.acquire(owner)
    assert [kv.blocks(owner) for owner in owners] == [(0,), (1,), (2,), (3,)]
    assert kv.num_free == 0
    with pytest.raises(AssertionError):
        kv.acquire(request())


def test_equal_requests_are_still_different_owners(kv):
    first, second = request(), request()
    kv.acquire(first)
    kv.acquire(second)
    kv.release(second)
    assert kv.blocks(first) == (0,)
    with pytest.raises(ValueError, match=r".*"):
        kv.blocks(second)


def test_a_row_holds_max_model_len_tokens_which_is_the_block_size(kv):
    assert kv.block_size == LENGTH
    if not keeps(kv):
        pytest.skip("this cache keeps nothing: task 0.1")
    keys, values = kv.layer(1)
    assert keys.shape == values.shape == (ROWS, LENGTH, 1, 2)
    keys.fill_(1)
    assert kv.layer(0)[0].abs().sum() == kv.layer(1)[1].abs().sum() == 0, "layers and sides must not share memory"
    keys.flatten(0, 1).index_copy_(0, torch.tensor([LENGTH + 2]), torch.full((1, 1, 2), 7.0))
    assert (kv.layer(1)[0][1, 2] == 7).all(), "slot = row * block_size + position must reach the cache itself"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_order_of_arrivals_and_ends_keeps_rows_dense_and_contents_right(part, data):
    module = part("kv_cache")
    cache = module.KVCache(module.KVSpec(2, 1, 2, torch.float32), ROWS, LENGTH, CPU)
    if not keeps(cache):
        pytest.skip("this cache keeps nothing: task 0.1")
    living: dict[Request, int] = {}
    for number in range(data.draw(st.integers(1, 25))):
        if living and (not cache.num_free or data.draw(st.booleans())):
            ended = data.draw(st.sampled_from(list(living)))
            cache.release(ended)
            del living[ended]
        else:
            new = request(str(number))
            cache.acquire(new)
            new.num_computed_tokens = data.draw(st.integers(0, LENGTH))
            living[new] = number
            write(cache, new, number)
        assert cache.num_free == ROWS - len(living)
        assert sorted(cache.blocks(owner) for owner in living) == [(row,) for row in range(len(living))]
        assert all(holds(cache, owner, value) for owner, value in living.items())
