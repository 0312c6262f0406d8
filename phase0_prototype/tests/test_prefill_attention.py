"""Attention of prompts and chunks against attention written out in float64, and beside torch's own in bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase0_prototype import prefill_attention
from phase0_prototype.prefill_attention import attention_in_blocks, causal_attention, causal_mask, why_not_blocks

CPU = torch.device("cpu")
SHAPES = [(4, 4), (4, 2), (6, 1), (32, 4)]  # (Hq, Hkv)
ROUNDING = 2.0**-8  # to bfloat16, of probabilities and again of the output: at most this share of the number


def inputs(tokens, length, heads, dim, dtype, spread=1.0, seed=0):
    """q [tokens, Hq, D], k and v [length, Hkv, D]; scores are normal with a deviation of `spread`."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads[0], dim, generator=generator) * spread
    k, v = torch.randn(2, length, heads[1], dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dense(q, k, v, window):
    """Every query against every key in float64: [Tq, Hq, D], and the same of |v|, which bounds what rounding can do."""
    tokens, length, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[2] ** -0.5
    behind = torch.arange(length - tokens, length)[:, None] - torch.arange(length)  # how far a key lies behind
    seen = (behind >= 0) & (behind < (window or length))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (torch.einsum("hqk,khd->qhd", weights, x) for x in (v, v.abs()))


def by_torch(q, k, v, scale, window):
    """The call that attention made before there were blocks."""
    mask = causal_mask(q.shape[0], k.shape[0], window, CPU)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    causal = {"attn_mask": mask, "is_causal": mask is None}
    out = sdpa(*heads_first, **causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


cases = st.tuples(
    st.integers(1, 150),  # queries
    st.sampled_from([0, 0, 1, 15, 64, 200]),  # tokens before them
    st.sampled_from(SHAPES),
    st.sampled_from([8, 64, 96]),
    st.sampled_from([None, None, 1, 2, 16, 63, 64, 65, 1000]),  # window
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases, st.sampled_from([None, 1, 16, 100]))
def test_blocks_in_float32_equal_float64(case, block):
    tokens, before, heads, dim, window = case
    q, k, v = inputs(tokens, before + tokens, heads, dim, torch.float32)
    expected, _ = dense(q, k, v, window)
    out = attention_in_blocks(q, k, v, dim**-0.5, window, block)
    assert out.shape == q.shape and out.is_contiguous()
    assert (out - expected).abs().max() < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases, st.sampled_from([0.3, 1.0, 4.0, 16.0]))
def test_blocks_in_bfloat16_are_off_by_two_roundings_however_large_the_scores(case, spread):
    tokens, before, heads, dim, window = case
    q, k, v = inputs(tokens, before + tokens, heads, dim, torch.bfloat16, spread)
    expected, bound = dense(q, k, v, window)
    error = (attention_in_blocks(q, k, v, dim**-0.5, window) - expected).abs()
    assert (error <= 2 * ROUNDING * bound * 1.01 + 1e-5).all()


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0, 16.0])
@pytest.mark.parametrize(
    ("tokens", "before", "window"), [(128, 0, None), (300, 0, 50), (64, 200, None), (512, 0, None)]
)
def test_blocks_are_about_as_exact_as_flash_attention(tokens, before, window, spread):
    q, k, v = inputs(tokens, before + tokens, (8, 2), 64, torch.bfloat16, spread)
    expected, _ = dense(q, k, v, window)
    flash = by_torch(q, k, v, 64**-0.5, window)
    ours = attention_in_blocks(q, k, v, 64**-0.5, window)
    error, flash_error = ((x - expected).square().mean().sqrt() for x in (ours, flash))
    assert error < 1.5 * flash_error


def test_the_inputs_are_left_as_they_are():
    for dtype in (torch.float32, torch.bfloat16):
        given_ = inputs(70, 90, (4, 2), 8, dtype)
        kept = [x.clone() for x in given_]
        attention_in_blocks(*given_, 0.3, 16)
        assert all(map(torch.equal, given_, kept))


def test_slices_of_one_projection_need_no_copies():
    qkv = torch.randn(70, 8, 64).bfloat16()  # as a fused projection leaves them: 4 query heads, 2 of keys, 2 of values
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    expected = attention_in_blocks(q.contiguous(), k.contiguous(), v.contiguous(), 0.125)
    assert torch.equal(attention_in_blocks(q, k, v, 0.125), expected)


@pytest.mark.parametrize("unseen", [float("nan"), 1e30])
def test_keys_before_the_window_are_not_read(unseen):
    q, k, v = inputs(80, 200, (4, 2), 16, torch.bfloat16)
    expected = attention_in_blocks(q, k, v, 0.25, window=40)
    k[:81], v[:81] = unseen, unseen  # the first query is token 120 and sees tokens 81 to 120
    assert torch.equal(attention_in_blocks(q, k, v, 0.25, window=40), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases)
def test_float32_takes_the_very_call_of_torch(case):
    tokens, before, heads, dim, window = case
    q, k, v = inputs(tokens, before + tokens, heads, dim, torch.float32)
    expected = by_torch(q, k, v, dim**-0.5, window)
    mask = causal_mask(tokens, before + tokens, window, CPU)
    assert torch.equal(causal_attention(q, k, v, dim**-0.5, window), expected)
    assert torch.equal(causal_attention(q, k, v, dim**-0.5, window, mask), expected)


@pytest.mark.parametrize(("tokens", "before", "window"), [(200, 0, None), (150, 250, None), (400, 0, 100)])
def test_a_long_prompt_in_bfloat16_goes_through_blocks_where_they_are_faster(tokens, before, window):
    q, k, v = inputs(tokens, before + tokens, (8, 2), 64, torch.bfloat16)
    chosen = causal_attention(q, k, v, 0.125, window)
    in_blocks = torch.equal(chosen, attention_in_blocks(q, k, v, 0.125, window))
    assert in_blocks == (not why_not_blocks(torch.bfloat16, CPU))


@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (1, 100), (20, 0), (3, 50)])
def test_a_short_prompt_in_bfloat16_goes_through_one_call_of_torch(tokens, before):
    q, k, v = inputs(tokens, before + tokens, (8, 2), 64, torch.bfloat16)
    assert torch.equal(causal_attention(q, k, v, 0.125), by_torch(q, k, v, 0.125, None))


def test_reasons_against_blocks_name_the_cause():
    assert why_not_blocks(torch.bfloat16, torch.device("cuda", 0)) == ["products over blocks are for CPUs, not cuda"]
    assert why_not_blocks(torch.float32, CPU) == ["probabilities in bfloat16 would make torch.float32 less exact"]


def test_a_mask_exists_only_where_the_plain_triangle_is_wrong():
    assert causal_mask(6, 6, None, CPU) is None
    assert causal_mask(6, 6, 6, CPU) is None
    assert causal_mask(2, 4, None, CPU).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(3, 3, 2, CPU).tolist() == [[True, False, False], [True, True, False], [False, True, True]]


@pytest.mark.parametrize(("heads", "length"), [(32, 128), (32, 2048), (32, 32768), (4, 100)])
def test_a_block_of_scores_stays_in_the_cache_while_blocks_are_not_too_short(heads, length):
    block = prefill_attention._block_size(heads, length)
    assert prefill_attention.SHORTEST_BLOCK <= block <= prefill_attention.LONGEST_BLOCK
    assert heads * block * length <= prefill_attention.SCORES or block == prefill_attention.SHORTEST_BLOCK
