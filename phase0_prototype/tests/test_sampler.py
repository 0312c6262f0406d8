"""The distribution that is drawn from is transformers'; the draws follow it; and a row knows nothing of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phase0_prototype import rng
from phase0_prototype.errors import SamplingError
from phase0_prototype.logprobs import logprobs_of
from phase0_prototype.outputs import Logprob, position_logprobs
from phase0_prototype.sampler import adjusted_logits, sample
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.sampling_rows import SamplingRows
from phase0_prototype.seeds import derive_seed

V = 64
LARGE_V = 4096


@dataclass
class Row:
    """A sequence as the sampler sees it."""

    params: SamplingParams
    prompt_token_ids: tuple[int, ...] = (1, 2, 3)
    output_token_ids: tuple[int, ...] = (2, 5, 5)
    seed: int = 0
    eos_token_ids: tuple[int, ...] = (0,)
    request_id: str = "r"


def random_logits(rows, vocab_size=V, seed=0, scale=3.0):
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def build(requests, logits):
    return SamplingRows.build(requests, logits.shape[1])


def draw(logits, requests):
    return sample(logits, build(requests, logits)).tolist()


def chi_square_p(counts, probabilities):
    """p-value of counts under probabilities; rare cells are pooled."""
    expected = probabilities.double() * counts.sum()
    order = expected.argsort()
    expected, counts = expected[order], counts[order].double()
    rare = int((expected < 5).sum())
    expected = torch.cat([expected[:rare].sum()[None], expected[rare:]])
    counts = torch.cat([counts[:rare].sum()[None], counts[rare:]])
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


# -- noise ------------------------------------------------------------------------------------------------------------


def noise(seeds, positions, tokens):
    return rng.uniform(torch.tensor(seeds), torch.tensor(positions), torch.arange(tokens))


def test_noise_is_strictly_between_0_and_1_at_the_ends_of_the_hash():
    ends = torch.tensor([0, -1, 1 << 33, 2**63 - 1, -(2**63)])
    assert rng._to_unit(ends).min() > 0 and rng._to_unit(ends).max() < 1
    assert rng._to_unit(ends).dtype == torch.float32


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_noise_is_uniform(seed):
    values = noise([seed] * 50, list(range(50)), LARGE_V).flatten()
    counts = torch.histc(values, bins=256, min=0, max=1)
    assert chi_square_p(counts, torch.full((256,), 1 / 256)) > 1e-3
    assert abs(values.mean() - 0.5) < 3e-3


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_noise_of_neighbours_is_independent(axis):
    count = 2000
    if axis == "seed":
        values = noise(list(range(count)), [7] * count, 64)
    elif axis == "position":
        values = noise([7] * count, list(range(count)), 64)
    else:
        values = noise(list(range(64)), [7] * 64, count).T
    pairs = (values[:-1] * 8).long() * 8 + (values[1:] * 8).long()  # joint histogram of neighbours
    assert chi_square_p(torch.bincount(pairs.flatten(), minlength=64), torch.full((64,), 1 / 64)) > 1e-3
    biased = (values[:-1] * 8).long() * 8 + (values[:-1] * 8).long()  # control: a number beside itself
    assert chi_square_p(torch.bincount(biased.flatten(), minlength=64), torch.full((64,), 1 / 64)) < 1e-12


def test_noise_is_the_published_splitmix64():
    """Against Python's integers, so that no wrap-around or sign of torch's int64 slips through."""
    mask = 2**64 - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    seed, position = 2**62 + 12345, 17
    stream = mix((mix(seed) + position) & mask)
    # token 0 has the counter itself: `mix` adds the constant first, so it is taken off before
    expected = [mix((stream + (token - 1) * 0x9E3779B97F4A7C15) & mask) for token in range(100)]
    bits = torch.tensor([value >> 33 & 0x7FFFFFFF for value in expected]).double()
    torch.testing.assert_close(noise([seed], [position], 100)[0].double(), (bits + 0.5) / 2**31, rtol=2e-7, atol=0)


def test_noise_of_some_tokens_is_that_of_all():
    some = torch.tensor([[5, 900, 3], [7, 7, 0]])
    seeds, positions = torch.tensor([3, 4]), torch.tensor([0, 9])
    assert torch.equal(rng.uniform(seeds, positions, some), noise([3, 4], [0, 9], 1000).gather(1, some))


def test_derived_seeds_differ_and_repeat():
    seeds = {derive_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) == derive_seed(1, 2)


# -- the distribution -------------------------------------------------------------------------------------------------


@st.composite
def parameters(draw):
    pick = lambda off, strategy: draw(st.one_of(st.just(off), strategy))  # noqa: E731
    return SamplingParams(
        temperature=pick(1.0, st.floats(0.2, 2)),
        top_k=pick(0, st.integers(1, V + 5)),
        top_p=pick(1.0, st.floats(0.05, 0.99)),
        min_p=pick(0.0, st.floats(0.01, 0.9)),
        repetition_penalty=pick(1.0, st.floats(0.5, 2)),
    )


def transformers_logits(logits, row):
    """transformers' processors in our order, in float64."""
    params, processors = row.params, LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    tokens = torch.tensor([[*row.prompt_token_ids, *row.output_token_ids]])
    return processors(tokens, logits.double()[None])[0]


def moved(params, factor):
    """The same request with its thresholds moved a little: where that matters, rounding may decide, too."""
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        repetition_penalty=params.repetition_penalty,
        top_p=min(1.0, params.top_p * factor),
        min_p=min(1.0, params.min_p * factor),
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(parameters(), min_size=1, max_size=4), st.integers(0, 10**6))
def test_distribution_is_that_of_transformers(params, seed):
    logits = random_logits(len(params), seed=seed)
    rows = [Row(p) for p in params]
    ours = adjusted_logits(logits, build(rows, logits))
    for row, given_logits, adjusted in zip(rows, logits, ours, strict=True):
        nearby = [transformers_logits(given_logits, Row(moved(row.params, f))) for f in (1 - 1e-5, 1 + 1e-5)]
        if (nearby[0].isinf() != nearby[1].isinf()).any():
            continue
        expected = transformers_logits(given_logits, row)
        assert torch.equal(adjusted.isinf(), expected.isinf())
        torch.testing.assert_close(adjusted.double().softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-7)


def test_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort():
    logits = random_logits(4, LARGE_V, scale=4)
    for top_p in (0.1, 0.5, 0.9, 0.999):
        adjusted = adjusted_logits(logits, build([Row(SamplingParams(top_p=top_p))] * 4, logits))
        ranked, order = logits.double().softmax(-1).sort(-1, descending=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before < top_p)
        unsure = torch.zeros_like(kept).scatter(1, order, (before - top_p).abs() < 1e-5)
        assert torch.equal((adjusted > -math.inf)[~unsure], kept[~unsure])


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(1, V)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    row = Row(params, prompt_token_ids=(1, 2, 3), output_token_ids=(2, 5, 5))
    expected = torch.zeros(1, V)
    expected[0, 2], expected[0, 5] = -0.75, -1.0
    assert torch.equal(adjusted_logits(logits, build([row], logits)), expected)


def test_repetition_penalty_ignores_tokens_that_the_model_has_no_logit_for():
    logits = torch.ones(1, V)
    row = Row(SamplingParams(repetition_penalty=2.0), prompt_token_ids=(V, V + 7, 3), output_token_ids=())
    assert adjusted_logits(logits, build([row], logits))[0].tolist() == [1, 1, 1, 0.5, *[1] * (V - 4)]


def test_equal_logits_at_the_edge_of_top_k_and_top_p_stay_together():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0, -5.0]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        kept = adjusted_logits(logits, build([Row(params)], logits))[0] > -math.inf
        assert kept.tolist() == [True, True, True, False, True, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_min_tokens(temperature):
    logits = torch.full((1, V), -9.0)
    logits[0, 0] = logits[0, 7] = 50.0  # the end token and a stop token
    params = SamplingParams(temperature=temperature, min_tokens=4, stop_token_ids=[7, 10**9])
    assert draw(logits, [Row(params, output_token_ids=(1, 1, 1))])[0] not in (0, 7)
    assert draw(logits, [Row(params, output_token_ids=(1, 1, 1, 1))])[0] in (0, 7)


def test_logits_are_left_as_they_were():
    logits = random_logits(2)
    before = logits.clone()
    params = SamplingParams(top_k=3, repetition_penalty=2, min_tokens=5, logprobs=2)
    draw(logits, [Row(params), Row(SamplingParams(temperature=0))])
    assert torch.equal(logits, before)


# -- the choice -------------------------------------------------------------------------------------------------------


def frequencies(logits, params, draws):
    """How often each token is drawn by requests with the seeds 0 .. draws - 1."""
    block = 1000
    counts = torch.zeros(logits.shape[0], dtype=torch.int64)
    for start in range(0, draws, block):
        rows = [Row(params, seed=start + i) for i in range(block)]
        counts += torch.bincount(torch.tensor(draw(logits.expand(block, -1), rows)), minlength=len(logits))
    return counts


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(top_k=20, min_p=0.02)],
    ids=["plain", "nucleus", "top-k and min-p"],
)
def test_draws_follow_the_distribution(params):
    logits = random_logits(1, scale=1.5)
    adjusted = adjusted_logits(logits, build([Row(params)], logits))[0]
    counts = frequencies(logits[0], params, 20_000)
    assert chi_square_p(counts, adjusted.softmax(-1)) > 1e-3
    wrong = (adjusted / 1.1).softmax(-1)  # control: the same test sees a temperature that is 10 % off
    assert chi_square_p(counts, wrong) < 1e-6


def test_draws_at_successive_positions_follow_the_distribution():
    logits = random_logits(1, scale=1.0).expand(4000, -1)
    rows = [Row(SamplingParams(), output_token_ids=(0,) * position, seed=11) for position in range(4000)]
    counts = torch.bincount(torch.tensor(draw(logits, rows)), minlength=V)
    assert chi_square_p(counts, logits[0].softmax(-1)) > 1e-3


anything = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    min_tokens=st.sampled_from([0, 10]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(anything, min_size=2, max_size=8), st.integers(0, 10**6), st.randoms())
def test_a_row_gets_the_same_token_alone_and_in_any_batch(params, seed, random):
    logits = random_logits(len(params), seed=seed).bfloat16().float()  # bfloat16 has ties
    rows = [Row(p, seed=seed + i, output_token_ids=(4,) * i) for i, p in enumerate(params)]
    alone = [draw(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = random.sample(range(len(rows)), random.randint(1, len(rows)))
    together = sample(logits[order], build([rows[i] for i in order], logits))
    assert together.tolist() == [alone[i] for i in order]
    for place, i in enumerate(order):
        if (k := params[i].logprobs) is not None:
            own = sample(logits[i : i + 1], build([rows[i]], logits)).logprobs
            assert torch.equal(own.top_ids[0, :k], together.logprobs.top_ids[place, :k])
            assert own.ranks[0] == together.logprobs.ranks[place]


def test_rows_with_filters_draw_the_same_beside_rows_without_at_a_large_vocabulary():
    """Few cells left: noise goes to those alone. Many left: to all. Both must be the same noise."""
    logits = random_logits(6, LARGE_V)
    filtered = [Row(SamplingParams(top_p=0.9, top_k=40), seed=i) for i in range(3)]
    free = [Row(SamplingParams(), seed=i) for i in range(3)]
    assert draw(logits, filtered + free) == draw(logits[:3], filtered) + draw(logits[3:], free)


def test_seed_position_and_nothing_else_decide():
    logits = torch.zeros(1, LARGE_V)
    params = SamplingParams()
    first = draw(logits, [Row(params, seed=1, output_token_ids=(1, 2))])
    assert first == draw(logits, [Row(params, seed=1, output_token_ids=(8, 9), prompt_token_ids=(), request_id="x")])
    assert first != draw(logits, [Row(params, seed=2, output_token_ids=(1, 2))])
    assert first != draw(logits, [Row(params, seed=1, output_token_ids=(1, 2, 3))])


def test_temperature_0_takes_the_first_largest_beside_random_rows():
    logits = torch.zeros(3, V)
    logits[:, 9] = logits[:, 30] = 1.0
    greedy, random = Row(SamplingParams(temperature=0)), Row(SamplingParams())
    assert draw(logits, [greedy, random, greedy])[::2] == [9, 9] == draw(logits[:2], [greedy, greedy])


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error_that_names_the_request(params, bad):
    logits = random_logits(3)
    logits[1, 5] = bad
    rows = [Row(params, request_id=name) for name in "abc"]
    with pytest.raises(SamplingError, match=r"request b \(row 1\).*NaN"):
        draw(logits, rows)
    assert draw(logits[[0, 2]], [rows[0], rows[2]])  # and the others are well


def test_minus_infinity_is_a_token_that_cannot_come_unless_all_are():
    logits = torch.full((2, V), -math.inf)
    logits[:, 3] = 1.0
    rows = [Row(SamplingParams(temperature=0)), Row(SamplingParams(top_p=0.9))]
    assert draw(logits, rows) == [3, 3]
    logits[1, 3] = -math.inf
    with pytest.raises(SamplingError, match="row 1"):
        draw(logits, rows)


# -- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_models_own_logits():
    logits = random_logits(2)
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=1.5, logprobs=4)
    sampled = sample(logits, build([Row(params), Row(SamplingParams(temperature=0))], logits))
    expected = logits.double().log_softmax(-1)
    found = sampled.logprobs
    assert torch.equal(found.token_ids, sampled.token_ids)
    own = expected.gather(1, sampled.token_ids[:, None])
    torch.testing.assert_close(found.logprobs.double(), own[:, 0], rtol=0, atol=1e-5)
    best = expected.topk(4)
    assert torch.equal(found.top_ids, best.indices)
    torch.testing.assert_close(found.top_logprobs.double(), best.values, rtol=0, atol=1e-5)
    assert torch.equal(found.ranks, 1 + (expected > own).sum(-1))


def test_equal_logits_rank_by_token_id():
    logits = torch.tensor([[-0.0, 3.0, 0.0, 3.0, -2.0]])
    found = logprobs_of(logits.expand(5, -1), torch.arange(5), -1)
    assert found.top_ids[0].tolist() == [1, 3, 0, 2, 4]
    assert found.ranks.tolist() == [3, 1, 4, 2, 5]


def test_more_logprobs_than_tokens_are_all_of_them():
    logits = random_logits(1, 8)
    assert logprobs_of(logits, torch.tensor([0]), 99).top_ids.shape == (1, 8)
    assert logprobs_of(logits, torch.tensor([0]), 0).top_ids.shape == (1, 0)


def test_the_named_form_begins_with_the_token_itself_and_ranks_the_others():
    named = position_logprobs(7, -2.0, 3, [4, 7], [-0.5, -2.0], str)
    assert named == {7: Logprob(-2.0, 3, "7"), 4: Logprob(-0.5, 1, "4")} and list(named) == [7, 4]


def test_plain_greedy_rows_need_no_tensors_and_no_logprobs():
    rows = SamplingRows.build([Row(SamplingParams(temperature=0))] * 64, V)
    assert rows.plain and rows.drawn is None
    assert sample(random_logits(64), rows).logprobs is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_the_cpu_draws():
    logits = random_logits(8, LARGE_V)
    for params in (SamplingParams(), SamplingParams(top_k=40), SamplingParams(top_p=0.8, repetition_penalty=1.2)):
        rows = [Row(params, seed=i) for i in range(8)]
        on_gpu = sample(logits.cuda(), SamplingRows.build(rows, LARGE_V, "cuda")).tolist()
        assert on_gpu == draw(logits, rows)
