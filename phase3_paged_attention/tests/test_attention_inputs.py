"""The steps that checks and benchmarks run on, and how they count and judge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phase3_paged_attention.kernels import reference
from phase3_paged_attention.kv_format import FORMATS, dequantise
from phase3_paged_attention.measures import attention_errors, mla_inputs
from phase3_paged_attention.measures.attention_inputs import (
    Case,
    decode,
    extend,
    make,
    more,
    pairs,
    tree_bits,
    zipf_lengths,
)
from phase3_paged_attention.measures.mla_inputs import LatentCase

RAGGED = Case((1, 33, 16), (1, 5, 16), 4, 2, 16, 16, torch.float32)


def computed(inputs, **changed):
    spec = inputs.case.spec
    given = {"scale": spec.scale, "window": spec.window, "soft_cap": spec.soft_cap, **changed}
    return reference.attend(inputs.q, inputs.kv, inputs, **given)


def off(inputs, got):
    expected = attention_errors.exact(inputs)
    return attention_errors.error(got, expected, attention_errors.allowed(inputs, expected))


def test_pages_are_a_permutation_and_unused_entries_name_a_block_of_nobody():
    inputs = make(RAGGED, "cpu")
    used = [table[: -(-length // 16)] for table, length in zip(inputs.block_tables, RAGGED.lengths, strict=True)]
    mine = torch.cat(used).tolist()
    assert sorted(mine) == list(range(5)) and mine != list(range(5))
    rest = [table[len(own) :].tolist() for table, own in zip(inputs.block_tables, used, strict=True)]
    assert all(entry == 5 for entries in rest for entry in entries) and all(rest)
    assert inputs.kv[0].shape[0] == 6


@pytest.mark.parametrize("kept", ["auto", *FORMATS])
def test_poison_is_everywhere_but_in_tokens(kept):
    case = replace(RAGGED, dtype=torch.float16, kv_format=kept)
    inputs = make(case, "cpu", poisoned=True)
    scales = inputs.kv[2:] or (torch.ones(1),) * 2
    for side, scale in zip(inputs.kv[:2], scales, strict=True):
        bad = dequantise(side, scale, torch.float32).isnan().all(-1).all(-1)  # [blocks, P]
        assert int((~bad).sum()) == sum(case.lengths)
    assert computed(inputs).isfinite().all()


def test_copies_differ_in_numbers_only():
    first, second = more(make(RAGGED, "cpu"), 2)
    assert first.block_tables is second.block_tables and not torch.equal(first.q, second.q)
    assert not torch.equal(first.kv[1], second.kv[1])


@pytest.mark.parametrize("window", [None, 1, 7, 45, 60])
@pytest.mark.parametrize(("length", "new"), [(1, 1), (50, 1), (50, 10), (50, 50)])
def test_pairs_are_those_that_the_masks_leave(length, new, window):
    assert pairs(length, new, window) == int(reference.visible_keys(new, length, window).sum())


def test_bytes_are_those_of_the_tensors():
    case = decode(2, 32, (4, 2, 16), dtype=torch.float16)
    inputs = make(case, "cpu")
    blocks = 4 / inputs.kv[0].shape[0]  # of 5, one is nobody's
    assert case.bytes == sum(side.nbytes for side in inputs.kv) * blocks + 2 * 2 * 4 * 16 * 2
    assert replace(case, window=10).bytes == case.bytes - 22 * 2 * (2 * 2 * 16 * 2)
    per_token = replace(case, kv_format="fp8_per_token_head")
    made = make(per_token, "cpu")
    assert per_token.bytes == sum(side.nbytes for side in made.kv) * blocks + 2 * 2 * 4 * 16 * 2


def test_zipf_has_one_long_sequence_and_many_short_ones():
    lengths = zipf_lengths(64, 32768)
    assert sorted(lengths, reverse=True)[:3] == [32768, 16384, 10922] and list(lengths) != sorted(lengths)


def test_nodes_of_a_tree_see_their_ancestors():
    bits = tree_bits(64, torch.Generator().manual_seed(0))
    for node, own in enumerate(bits):
        seen = [other for other in range(64) if own >> other & 1]
        assert seen[-1] == node and 0 in seen
        parent = seen[-2] if node else None
        assert parent is None or (bits[parent] | 1 << node) & (1 << 64) - 1 == own & (1 << 64) - 1
    with pytest.raises(ValueError, match="bits for 64"):
        tree_bits(65, torch.Generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_results_are_within_what_is_allowed_and_wrong_ones_are_not(dtype):
    inputs = make(replace(RAGGED, dtype=dtype, soft_cap=5.0, window=9), "cpu", poisoned=True)
    right = computed(inputs)
    assert 0 < off(inputs, right) <= 1
    assert off(inputs, computed(inputs, soft_cap=None)) > 1
    assert off(inputs, computed(inputs, window=10)) > 1
    assert off(inputs, right[:-1]) == off(inputs, right.where(right < right.max(), float("nan"))) == float("inf")


def test_some_rows_are_judged_as_in_the_whole_step():
    inputs = make(replace(RAGGED, window=9), "cpu")
    few, rows = attention_errors.some(inputs, [0, 2], 3)
    assert rows.tolist() == [0, 19, 20, 21] and few.case.new == (1, 3)
    assert torch.allclose(attention_errors.exact(few), attention_errors.exact(inputs)[rows])


@pytest.mark.parametrize("packed", [False, True])
def test_latents_are_judged_too(packed):
    case = LatentCase((40, 9, 5), (1, 3, 5), 2, 128, 8, 16, torch.float16, packed, tree=packed)
    inputs = mla_inputs.make(case, "cpu", poisoned=True)
    expected, allowed, rows = mla_inputs.exact(inputs, range(3))
    assert expected.isfinite().all() and rows == slice(0, 9) and expected.shape == (9, 2, 128)
    assert attention_errors.error(expected.half(), expected, allowed) <= 1
    last = mla_inputs.exact(inputs, range(1, 3))
    assert torch.equal(last[0], expected[last[2]]) and last[2] == slice(1, 9)
    assert case.flops == 2 * (2 * 128 + 8) * 2 * (40 + 7 + 8 + 9 + 15)
    entry = inputs.cache[0, 0].numel() * inputs.cache.element_size()
    assert case.bytes == 54 * entry + inputs.q.nbytes + 9 * 2 * 128 * 2


def test_rows_of_a_table_say_what_is_unusual():
    assert str(decode(64, 8192)) == "B64 x 8192, 32+8x128, page 16"
    special = extend(2, 50, 7, (4, 2, 16), kv_format="fp8_e5m2", window=9, soft_cap=30.0, dtype=torch.float16)
    assert str(special) == "B2 x 50, 4+2x16, page 16, 7 new, fp8_e5m2, window 9, cap 30, float16"
    assert str(RAGGED).startswith("B3 x 1..33")
