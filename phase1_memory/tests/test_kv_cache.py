"""The paged cache: what is written stays, through copies on write, and through leaving the memory and coming back."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.kv_spec import KVPart, KVSpec
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase1_memory.kv_cache import pieces
from phase1_memory.runs import Write

BLOCKS, PAGE = 10, 4
SCALED = (*(KVPart((3, 5), torch.float8_e4m3fn),) * 2, *(KVPart((3,), torch.float32),) * 2)  # 8 bits, scales by token
PACKED = (KVPart((1, 7), torch.uint8), KVPart((1, 0), torch.uint8))  # one part of odd bytes, none of the other


def request(name: str, computed: int = 0) -> Request:
    return Request(name, list(range(computed)), SamplingParams(), 0, (), 5, num_computed_tokens=computed)


def sides(kv):
    return [side for layer in range(kv.spec.num_layers) for side in kv.layer(layer)]


def fill(kv) -> None:
    """Every number of the cache is another one."""
    for i, side in enumerate(sides(kv)):
        side.copy_(torch.arange(side.numel()).view(side.shape) + 1000 * i)


def hold(kv, name: str, tokens: int) -> Request:
    """A sequence with so many computed tokens, which holds blocks for them."""
    assert kv.reserve([Write(name, 0, tokens)])
    return request(name, tokens)


def bits(side: torch.Tensor) -> torch.Tensor:
    """Bytes of a tensor: NaN of 8 bits are equal here, and torch compares no float8."""
    return side.view(torch.uint8)


def tokens_of(kv, owner) -> torch.Tensor:
    """[sides, tokens, Hkv, D]: what the owner would read."""
    table = list(kv.blocks(owner))
    return torch.stack([side[table].flatten(0, 1)[: owner.num_computed_tokens] for side in sides(kv)])


@pytest.fixture
def kv(make_cache):
    cache = make_cache(BLOCKS, PAGE)
    fill(cache)
    return cache


def test_a_block_of_tinyllama_has_360448_bytes(make_cache):
    spec = KVSpec(num_layers=22, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16)
    cache = make_cache(2, 16, spec)
    assert cache.block_bytes == 22 * 2 * 16 * 4 * 64 * 2
    assert sum(side[0].nbytes for side in sides(cache)) == cache.block_bytes


def test_layers_keys_and_values_share_no_memory_and_slots_reach_them(make_cache):
    cache = make_cache(BLOCKS, PAGE, KVSpec(3, 2, 8, torch.float16))
    assert len(cache.layers) == 3
    for i, side in enumerate(sides(cache)):
        assert side.shape[1:] == (PAGE, 2, 8) and side.shape[0] >= BLOCKS and side.dtype == torch.float16
        side.flatten(0, 1)[5 * PAGE + 3] = i + 1
    assert [side.sum().item() for side in sides(cache)] == [16 * (i + 1) for i in range(6)]
    assert all(side[5, 3].eq(i + 1).all() for i, side in enumerate(sides(cache)))


def test_all_blocks_can_be_held_and_all_come_back(kv):
    owners = [hold(kv, str(i), PAGE * 2) for i in range(BLOCKS // 2)]
    assert kv.num_free == 0
    assert not kv.reserve([Write("more", 0, 1)])
    assert sorted(block for owner in owners for block in kv.blocks(owner)) == list(range(BLOCKS))
    for i, owner in enumerate(owners):
        kv.release(owner)
        kv.release(owner)  # again does nothing
        assert kv.num_free == 2 * (i + 1)


def test_what_was_just_computed_can_be_read_by_the_next_step(kv):
    assert kv.computed(hold(kv, "a", 7), 7) == 7


def test_padded_rows_write_where_nobody_reads(kv):
    owner = hold(kv, "a", PAGE * BLOCKS)
    before = tokens_of(kv, owner)
    spare = kv.spare((kv.blocks(owner),), 3)
    assert len(spare) == 3
    for table in spare:
        for side in sides(kv):
            side.flatten(0, 1)[table[0] * PAGE] = -1
    assert torch.equal(tokens_of(kv, owner), before)


def test_a_child_reads_its_parents_tokens_as_far_as_it_says_that_it_has_them(kv):
    parent, child = hold(kv, "a", 6), request("b")
    kv.fork(parent, child)
    assert 0 <= child.num_computed_tokens <= 6
    if child.num_computed_tokens:
        assert torch.equal(tokens_of(kv, child), tokens_of(kv, parent)[:, : child.num_computed_tokens])


def test_a_childs_writes_don_t_reach_its_parent_nor_the_parents_the_child(kv):
    parent, child = hold(kv, "a", 6), request("b")
    kv.fork(parent, child)
    mine = tokens_of(kv, parent)
    assert kv.reserve([Write("b", child.num_computed_tokens, 7), Write("a", 6, 7)])
    for side in sides(kv):
        side.view(-1, 1, 2)[kv.blocks(child)[1] * PAGE + 2] = -5
        side.view(-1, 1, 2)[kv.blocks(parent)[1] * PAGE + 2] = -6
    assert torch.equal(tokens_of(kv, parent), mine)
    for owner, said in ((parent, -6), (child, -5)):
        owner.num_computed_tokens = 7
        assert tokens_of(kv, owner)[:, 6].eq(said).all()


# Copies on write


@pytest.mark.usefixtures("sharing")
def test_a_copy_moves_keys_and_values_of_all_layers(kv):
    parent, child = hold(kv, "a", 6), request("b")
    kv.fork(parent, child)
    before = tokens_of(kv, parent)
    assert kv.reserve([Write("b", 6, 7), Write("a", 6, 7)])
    assert kv.blocks(parent)[0] == kv.blocks(child)[0] and kv.blocks(parent)[1] != kv.blocks(child)[1]
    assert torch.equal(tokens_of(kv, parent), before)
    assert torch.equal(tokens_of(kv, child), before)
    assert kv.copied_blocks == 1


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("kept", [SCALED, PACKED], ids=["scales", "packed"])
def test_a_copy_moves_all_that_a_layer_keeps(make_cache, kept):
    cache = make_cache(BLOCKS, PAGE, KVSpec(2, 3, 5, torch.float32, kept=kept))
    assert cache.block_bytes == PAGE * 2 * sum(part.bytes for part in kept) == sum(s[0].nbytes for s in sides(cache))
    assert [(s.shape[2:], s.dtype) for s in cache.layer(1)] == [(part.shape, part.dtype) for part in kept]
    for side in sides(cache):
        bits(side).copy_(torch.randint(256, bits(side).shape, dtype=torch.uint8))
    parent, child = hold(cache, "a", 6), request("b")
    cache.fork(parent, child)
    old, before = cache.blocks(parent)[1], [side.clone() for side in sides(cache)]
    assert cache.reserve([Write("b", 6, 7), Write("a", 6, 7)])
    both = [cache.blocks(parent)[1], cache.blocks(child)[1]]
    assert both[0] != both[1]
    for side, was in zip(sides(cache), before, strict=True):
        assert all(torch.equal(bits(side)[block], bits(was)[old]) for block in both)
        others = [block for block in range(BLOCKS) if block not in both]
        assert torch.equal(bits(side)[others], bits(was)[others])


@pytest.mark.usefixtures("sharing")
def test_many_copies_of_one_step_all_arrive(kv):
    parents = [hold(kv, name, 3) for name in "abc"]
    children = [request(name) for name in "defgh"]
    for i, child in enumerate(children):
        kv.fork(parents[i % 3], child)
    before = [tokens_of(kv, owner) for owner in (*parents, *children)]
    assert kv.reserve([Write(owner.request_id, 3, 4) for owner in (*parents, *children)])
    assert kv.copied_blocks == 5
    assert len({kv.blocks(owner) for owner in (*parents, *children)}) == 8
    for owner, expected in zip((*parents, *children), before, strict=True):
        assert torch.equal(tokens_of(kv, owner), expected)


def test_a_refused_step_copies_nothing(kv):
    parent, child = hold(kv, "a", 6), request("b")
    kv.fork(parent, child)
    hold(kv, "c", PAGE * (BLOCKS - 2))
    before = [side.clone() for side in sides(kv)]
    assert not kv.reserve([Write("b", 6, 7), Write("a", 6, 7)])
    assert kv.copied_blocks == 0
    assert all(torch.equal(side, old) for side, old in zip(sides(kv), before, strict=True))


# Out of the memory and back


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TABLES = st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=1, max_size=BLOCKS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    source=TABLES,
    seed=st.integers(0, 99),
    runs=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    kept=st.sampled_from([None, SCALED, PACKED]),
)
def test_blocks_come_back_into_any_other_blocks(make_cache, source, seed, runs, dtype, kept):
    spec = KVSpec(num_layers=2, num_kv_heads=3, head_dim=4, dtype=dtype, kept=kept)
    cache, other = make_cache(BLOCKS, PAGE, spec), make_cache(BLOCKS, PAGE, spec)
    generator = torch.Generator().manual_seed(seed)
    for side in (*sides(cache), *sides(other)):
        bits(side).copy_(torch.randint(256, bits(side).shape, generator=generator, dtype=torch.uint8))
    source = sorted(source) if runs else source
    first = random.Random(seed).randint(0, BLOCKS - len(source))
    target = list(range(first, first + len(source))) if runs else random.Random(seed).sample(range(BLOCKS), len(source))
    untouched = [block for block in range(BLOCKS) if block not in target]
    before = [bits(side)[untouched] for side in sides(other)]
    data = cache.read(source)
    assert data.dtype == torch.uint8 and tuple(data.shape) == (len(source), cache.block_bytes) and data.is_contiguous()
    expected = [bits(side)[source] for side in sides(cache)]
    for side in sides(cache):
        side.zero_()  # what was read is a copy
    other.write(target, data)
    for side, wanted, old in zip(sides(other), expected, before, strict=True):
        assert torch.equal(bits(side)[target], wanted)
        assert torch.equal(bits(side)[untouched], old), "a block that nobody spoke of was written"


def test_a_sequence_without_computed_tokens_has_no_bytes(kv):
    data = kv.read([])
    assert tuple(data.shape) == (0, kv.block_bytes)
    kv.write([], data)


def test_equal_bytes_in_any_order_of_blocks(kv):
    """The n-th row is the n-th block, wherever it lies: a request may come back in pieces."""
    together = kv.read([7, 2, 3])
    for row, block in zip(together, [7, 2, 3], strict=True):
        assert torch.equal(row, kv.read([block])[0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), unique=True))
def test_pieces_cover_the_list_with_runs_that_cannot_be_longer(blocks):
    found = pieces(blocks)
    assert [i for at, _ in found for i in range(at.start, at.stop)] == list(range(len(blocks)))
    assert [block for _, run in found for block in range(run.start, run.stop)] == blocks
    assert all(a.stop != b.start for (_, a), (_, b) in itertools.pairwise(found))
