"""The torch backend against attention written out in float64: every mask, every mix of prompts, chunks and decodes."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.attention import AttentionSpec, TorchAttention, write_kv
from phase0_prototype.batch import Batch
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step

ROWS, BLOCK, D = 6, 40, 8
SHAPES = [(4, 4), (4, 2), (6, 1)]  # (Hq, Hkv)


def batch_of(sequences) -> Batch:
    """A batch of (row, tokens in the cache, new tokens)."""
    scheduled, blocks = [], []
    for row, cached, new in sequences:
        request = Request(str(row), list(range(cached + new)), SamplingParams(), 0, (), 1)
        scheduled.append(ScheduledRequest(request, cached, new))
        blocks.append((row,))
    return Batch.build(Step(tuple(scheduled)), blocks, BLOCK, torch.device("cpu"))


def brute_force(spec, q, keys, values, position):
    """One query [Hq, D] at `position` of a sequence whose keys and values are [kv, Hkv, D]; float64."""
    first = 0 if spec.window is None else max(0, position + 1 - spec.window)
    out = []
    for head in range(spec.num_heads):
        shared = head * spec.num_kv_heads // spec.num_heads
        k, v = keys[first : position + 1, shared].double(), values[first : position + 1, shared].double()
        weights = [math.exp(score) for score in (k @ q[head].double() * spec.scale).tolist()]
        out.append(sum(w * row for w, row in zip(weights, v, strict=True)) / sum(weights))
    return torch.cat(out)


def error_of(sequences, *, heads=(4, 2), window=None, round_up=1) -> float:
    """Largest difference to brute force of one step, on a cache that is garbage where nothing was written."""
    generator = torch.Generator().manual_seed(0)
    spec = AttentionSpec(*heads, D, D**-0.5, window)
    cache = [torch.full((ROWS, BLOCK, heads[1], D), 1e4) for _ in "kv"]
    history = {row: torch.randn(2, cached + new, heads[1], D, generator=generator) for row, cached, new in sequences}
    for row, cached, _ in sequences:
        for side in (0, 1):
            cache[side][row, :cached] = history[row][side, :cached]
    tokens = sum(new for *_, new in sequences)
    q = torch.randn(tokens, heads[0], D, generator=generator)
    k, v = (torch.cat([history[row][side, cached:] for row, cached, _ in sequences]) for side in (0, 1))
    backend = TorchAttention(round_up)
    batch = batch_of(sequences)
    plan = backend.plan(batch, frozenset({window, None}), BLOCK)
    write_kv(cache[0], cache[1], plan.slots, k, v)
    out = backend.run(spec, q, k, v, (cache[0], cache[1]), plan)
    assert out.shape == (tokens, heads[0] * D)
    worst, starts = 0.0, [0, *accumulate(new for *_, new in sequences)]
    for (row, cached, new), (start, _) in zip(sequences, pairwise(starts), strict=True):
        assert torch.equal(cache[0][row, : cached + new], history[row][0]), "keys are not where they belong"
        assert torch.equal(cache[1][row, : cached + new], history[row][1]), "values are not where they belong"
        for i in range(new):
            expected = brute_force(spec, q[start + i], *history[row], cached + i)
            worst = max(worst, (out[start + i] - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param([(0, 0, 13)], id="prompt"),
        pytest.param([(0, 0, 1), (1, 0, 9), (2, 0, 4)], id="prompts"),
        pytest.param([(0, 7, 6)], id="chunk-with-prefix"),
        pytest.param([(2, 0, 9), (0, 20, 3), (4, 1, 2)], id="chunks-in-any-rows"),
        pytest.param([(0, 12, 1), (1, 3, 1), (2, BLOCK - 1, 1)], id="decodes"),
        pytest.param([(3, 5, 1), (4, 30, 1)], id="decodes-not-from-row-0"),
        pytest.param([(2, 12, 1), (0, 3, 1), (1, 9, 1)], id="decodes-in-shuffled-rows"),
        pytest.param([(0, 12, 1), (3, 3, 1), (5, 9, 1)], id="decodes-with-gaps"),
        pytest.param([(0, 12, 1), (1, 4, 1), (2, 0, 8), (3, 5, 6)], id="decodes-then-prompts"),
        pytest.param([(2, 0, 8), (0, 12, 1), (3, 5, 6), (1, 4, 1)], id="prompts-between-decodes"),
    ],
)
def test_attention_equals_float64(sequences, window, heads):
    assert error_of(sequences, heads=heads, window=window) < 1e-5


@pytest.mark.parametrize("round_up", [4, 16, 256])
@pytest.mark.parametrize("window", [None, 5])
def test_what_a_rounded_up_decode_reads_too_much_has_no_effect(round_up, window):
    assert error_of([(1, 12, 1), (2, 3, 1), (3, BLOCK - 1, 1)], window=window, round_up=round_up) < 1e-5


@st.composite
def steps(draw):
    rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
    sequences = []
    for row in rows:
        new = draw(st.sampled_from([1, 1, 1, 2, 7]))
        sequences.append((row, draw(st.integers(0, BLOCK - new)), new))
    return sequences


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps(), st.sampled_from(SHAPES), st.sampled_from([None, 1, 4, 100]), st.sampled_from([1, 16]))
def test_any_step_equals_float64(sequences, heads, window, round_up):
    assert error_of(sequences, heads=heads, window=window, round_up=round_up) < 1e-5


def test_decodes_in_neighbouring_rows_share_one_call():
    plan = TorchAttention().plan(batch_of([(1, 5, 1), (2, 9, 1), (3, 1, 1)]), frozenset({None}), BLOCK)
    assert (plan.first_row, plan.num_decodes, plan.kv_len, plan.sequences) == (1, 3, 10, ())


def test_masks_exist_only_where_the_plain_causal_one_is_wrong():
    batch = batch_of([(0, 0, 6), (1, 4, 2)])
    plan = TorchAttention().plan(batch, frozenset({None, 6, 3}), BLOCK)
    assert set(plan.causal) == {(0, 3), (1, None), (1, 6), (1, 3)}
