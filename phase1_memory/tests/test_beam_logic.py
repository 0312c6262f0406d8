"""The logic of beam search, without pages and without the engine: a model is run anew on all tokens of each live beam.

Three oracles that share nothing with it: `generate` of transformers, enumeration of every sequence, and a beam search
in plain lists that never stops early.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.errors import SamplingError, UserError
from phase1_memory.beam_search import Beams, BeamSearchParams, Branch, Hypothesis
from phase1_memory.tests.beam_oracle import hf_beams, tiny_llama

STOPPING: tuple[Any, ...] = (False, True, "never")
PENALTIES = (0.0, 0.5, 1.0, 2.0, -0.5)
# (seed, vocabulary, eos ids, prompt)
MODELS: tuple[tuple[int, int, tuple[int, ...], tuple[int, ...]], ...] = (
    (0, 50, (5,), (7,)),
    (1, 96, (5, 9, 11), (3, 10, 17, 24, 31)),
    (2, 300, (17, 250), (40, 2, 40)),
    (3, 64, (), (1, 2, 3, 4)),
)
Model = Callable[[tuple[int, ...]], Sequence[float]]  # generated tokens -> log-probabilities of the next one


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Tiny tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


llama = functools.cache(tiny_llama)


@torch.no_grad()
def search(model: Any, prompt: Sequence[int], params: BeamSearchParams) -> list[Hypothesis]:
    beams = Beams(params, model.generation_config.eos_token_id or ())
    while not beams.done:
        rows = torch.tensor([[*prompt, *tokens] for tokens in beams.live])
        beams.advance(model(rows, use_cache=False).logits[:, -1].log_softmax(-1))
    return beams.best()


def same(found: Sequence[Hypothesis], wanted: Sequence[tuple[list[int], float]]) -> None:
    assert [list(one.token_ids) for one in found] == [tokens for tokens, _ in wanted]
    assert [one.score for one in found] == pytest.approx([score for _, score in wanted], rel=1e-4, abs=1e-4)


def toy(seed: int, vocab_size: int) -> Model:
    """Log-probabilities in eighths: sums are exact, and many are equal. They need not add up to 1."""

    @functools.cache
    def logprobs(tokens: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{seed} {tokens}")
        return [-rng.randint(1, 24) / 8 for _ in range(vocab_size)]

    return logprobs


def run(model: Model, params: BeamSearchParams, ends: Sequence[int] = ()) -> Beams:
    beams = Beams(params, ends)
    while not beams.done:
        beams.advance(torch.tensor([model(tokens) for tokens in beams.live]))
    return beams


def patient(model: Model, params: BeamSearchParams, ends: Sequence[int]) -> list[tuple[tuple[int, ...], float]]:
    """A beam search that always goes on to `max_tokens`."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for length in range(1, params.max_tokens + 1):
        grown = [((*tokens, i), total + new) for tokens, total in live for i, new in enumerate(model(tokens))]
        grown.sort(key=lambda one: -one[1])  # stable: equal ones stay in the order of beam and token
        over = [one for one in grown if one[0][-1] in ends or length == params.max_tokens]
        finished += [
            (one[0], one[1] / length**params.length_penalty) for one in over if one in grown[: params.beam_width]
        ]
        live = [one for one in grown if one not in over][: params.beam_width]
    return sorted(finished, key=lambda one: -one[1])[: params.beam_width]


# What transformers finds


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("early_stopping", STOPPING)
def test_sequences_order_and_scores_are_those_of_transformers(early_stopping: Any, length_penalty: float) -> None:
    for (seed, vocab_size, ends, prompt), (beam_width, max_tokens) in zip(
        MODELS * 3,
        [(1, 9), (2, 40), (3, 7), (4, 12), (5, 2), (6, 24), (2, 1), (6, 5), (4, 40), (3, 18), (1, 30), (5, 3)],
        strict=True,
    ):
        params = BeamSearchParams(beam_width, max_tokens, length_penalty, early_stopping)
        model = llama(seed, vocab_size, ends)
        same(search(model, prompt, params), hf_beams(model, prompt, params))


def test_the_cases_above_end_in_every_way() -> None:
    """Else the comparison proves little: options must change the answer, and both reasons to finish must occur."""
    seed, vocab_size, ends, prompt = MODELS[1]
    answers = {
        options: search(llama(seed, vocab_size, ends), prompt, BeamSearchParams(4, 24, options[0], options[1]))
        for options in itertools.product(PENALTIES, STOPPING)
    }
    assert {one.finish_reason for found in answers.values() for one in found} == {"stop", "length"}
    assert len({tuple(one.token_ids for one in found) for found in answers.values()}) >= 6


def test_stop_tokens_and_ignored_end_tokens_are_those_of_transformers() -> None:
    seed, vocab_size, ends, prompt = MODELS[1]
    model = llama(seed, vocab_size, ends)
    plain = BeamSearchParams(4, 12)
    stop = [search(model, prompt, replace(plain, ignore_eos=True))[0].token_ids[3]]
    for params in (replace(plain, stop_token_ids=stop), replace(plain, ignore_eos=True, stop_token_ids=stop),
                   replace(plain, ignore_eos=True)):  # fmt: skip
        found = search(model, prompt, params)
        same(found, hf_beams(model, prompt, params))
        for one in found:
            stopped = one.token_ids[-1] in stop
            ended = one.token_ids[-1] in ends and not params.ignore_eos
            assert one.stop_reason == (one.token_ids[-1] if stopped and params.stop_token_ids else None)
            assert one.finish_reason == ("stop" if one.stop_reason is not None or ended else "length")


def test_fewer_than_all_beams_are_returned_on_request() -> None:
    seed, vocab_size, ends, prompt = MODELS[0]
    params = BeamSearchParams(4, 8, n=2)
    found = search(llama(seed, vocab_size, ends), prompt, params)
    assert len(found) == 2
    same(found, hf_beams(llama(seed, vocab_size, ends), prompt, params))


def test_one_beam_is_greedy_decoding_whatever_early_stopping_says() -> None:
    model = toy(seed=3, vocab_size=8)
    for early_stopping, length_penalty in itertools.product(STOPPING, PENALTIES):
        greedy: tuple[int, ...] = ()
        while len(greedy) < 20 and 2 not in greedy:
            row = model(greedy)
            greedy = (*greedy, row.index(max(row)))
        (found,) = run(model, BeamSearchParams(1, 20, length_penalty, early_stopping), ends=[2]).best()
        assert found.token_ids == greedy


# Enumeration, and a search that never stops early


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_sequences(seed: int, length_penalty: float) -> None:
    vocab_size, depth, end = 4, 3, 1
    model = toy(seed, vocab_size)
    scores = {}
    for path in itertools.product(range(vocab_size), repeat=depth):
        tokens = path[: path.index(end) + 1] if end in path else path
        total = sum(model(tokens[:i])[token] for i, token in enumerate(tokens))
        scores[tokens] = total / len(tokens) ** length_penalty
    found = run(model, BeamSearchParams(vocab_size**depth, depth, length_penalty, "never"), [end]).best()
    assert {one.token_ids: one.score for one in found} == scores
    assert found[0].score == max(scores.values())


toys = st.builds(toy, st.integers(0, 10**6), st.integers(9, 14))
widths, limits = st.integers(1, 6), st.integers(1, 9)
some_ends = st.sets(st.integers(0, 8), max_size=3).map(sorted)
penalties, stopping = st.sampled_from(PENALTIES), st.sampled_from(STOPPING)


@settings(max_examples=150, deadline=None)
@given(toys, st.integers(2, 6), limits, some_ends, penalties)
def test_never_gives_nothing_up_that_would_have_won(
    model: Model, beam_width: int, max_tokens: int, ends: list[int], length_penalty: float
) -> None:
    params = BeamSearchParams(beam_width, max_tokens, length_penalty, "never")
    found = [(one.token_ids, one.score) for one in run(model, params, ends).best()]
    assert found == patient(model, params, ends)


@settings(max_examples=60, deadline=None)
@given(toys, widths, limits, some_ends, penalties)
def test_stopping_later_never_finds_worse(
    model: Model, beam_width: int, max_tokens: int, ends: list[int], length_penalty: float
) -> None:
    at_once, usual, never = (
        [h.score for h in run(model, BeamSearchParams(beam_width, max_tokens, length_penalty, rule), ends).best()]
        for rule in (True, False, "never")
    )
    assert all(a <= b <= c for a, b, c in zip(at_once, usual, never, strict=True))


# What holds in every step


@settings(max_examples=150, deadline=None)
@given(toys, widths, limits, some_ends, penalties, stopping)
def test_every_step_keeps_the_books(
    model: Model, beam_width: int, max_tokens: int, ends: list[int], length_penalty: float, early_stopping: Any
) -> None:
    beams = Beams(BeamSearchParams(beam_width, max_tokens, length_penalty, early_stopping), ends)
    while not beams.done:
        before = beams.live
        branches = beams.advance(torch.tensor([model(tokens) for tokens in before]))
        assert beams.live == [(*before[branch.parent], branch.token_id) for branch in branches]
        assert len(set(beams.live)) == len(branches) <= beam_width
        assert beams.done == (not branches)
        assert [branch.score for branch in branches] == sorted((branch.score for branch in branches), reverse=True)
        for tokens, branch in zip(beams.live, branches, strict=True):
            assert branch.score == sum(model(tokens[:i])[token] for i, token in enumerate(tokens))
            assert not set(tokens) & set(ends) and len(tokens) < max_tokens
    found = beams.best()
    assert len(found) == beam_width == len({one.token_ids for one in found})
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert one.cumulative_logprob == sum(model(one.token_ids[:i])[token] for i, token in enumerate(one.token_ids))
        assert one.score == one.cumulative_logprob / len(one.token_ids) ** length_penalty
        assert not set(one.token_ids[:-1]) & set(ends)
        assert one.token_ids[-1] in ends or len(one.token_ids) == max_tokens
    assert [beams.best(n) for n in range(1, beam_width + 1)] == [found[:n] for n in range(1, beam_width + 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=7, max_size=7), min_size=4, max_size=4), st.integers(4, 6))
def test_equal_scores_go_to_the_earlier_beam_and_then_to_the_smaller_token(table: list[list[int]], width: int) -> None:
    beams = Beams(BeamSearchParams(width, 3))
    row = torch.tensor([[-1.0, -1.0, -1.0, -1.0, *[-math.inf] * 3]])
    live = beams.advance(row)
    assert live == [Branch(0, token, -1.0) for token in range(4)]
    cells = sorted((cost, beam, token) for beam, costs in enumerate(table) for token, cost in enumerate(costs))
    found = beams.advance(-torch.tensor(table, dtype=torch.float32))
    assert found == [Branch(beam, token, -1.0 - cost) for cost, beam, token in cells[:width]]


# Single steps, by hand


def test_branches_say_whose_blocks_are_forked_kept_and_freed() -> None:
    beams = Beams(BeamSearchParams(beam_width=3, max_tokens=8))
    assert beams.live == [()]
    beams.advance(torch.tensor([[-1.0, -2.0, -3.0, -9.0]]))
    branches = beams.advance(
        torch.tensor([[-9.0, -1.0, -9.0, -2.0], [-9.0, -9.0, -9.0, -9.0], [-0.25, -9.0, -9.0, -9.0]])
    )
    assert branches == [Branch(0, 1, -2.0), Branch(0, 3, -3.0), Branch(2, 0, -3.25)]  # 0 twice, 1 not at all, 2 once
    assert beams.live == [(0, 1), (0, 3), (2, 0)]


def test_an_end_token_below_the_best_beams_finishes_nothing_and_takes_nobodys_place() -> None:
    row = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -9.0]])
    third = Beams(BeamSearchParams(beam_width=2, max_tokens=8), eos_token_ids=[2])
    assert [branch.token_id for branch in third.advance(row)] == [0, 1] and third.best() == []
    second = Beams(BeamSearchParams(beam_width=2, max_tokens=8), eos_token_ids=[1])
    assert [branch.token_id for branch in second.advance(row)] == [0, 2]
    assert second.best() == [Hypothesis((1,), -2.0, -2.0, "stop", None)]


@pytest.mark.parametrize(
    ("length_penalty", "end", "live"),
    [
        (1.0, -0.9, {False: 0, True: 0, "never": 2}),  # scores -1.25 live, -1.2 finished: but -0.25 is possible
        (1.0, -1.0, {False: 0, True: 0, "never": 2}),  # equal: who was first stays
        (1.0, -1.3, {False: 2, True: 0, "never": 2}),  # -1.25 live, -1.4 finished
        (-1.0, -1.3, {False: 2, True: 0, "never": 2}),  # -5 live, -5.6 finished; length only makes it worse
        (-1.0, -0.9, {False: 0, True: 0, "never": 0}),  # -5 live, -4.8 finished
    ],
)
def test_early_stopping_decides_what_becomes_of_live_beams(
    length_penalty: float, end: float, live: dict[Any, int]
) -> None:
    """The best live one has the sum -2.5 after 2 of 10 tokens, the worst finished one -1.5 + end."""
    for early_stopping, count in live.items():
        beams = Beams(BeamSearchParams(2, 10, length_penalty, early_stopping), eos_token_ids=[0])
        beams.advance(torch.tensor([[-1.0, -1.5, -2.0]]))
        assert len(beams.advance(torch.tensor([[end, -1.0, -9.0], [-9.0, -9.0, -9.0]]))) == count
        assert beams.done == (count == 0)


@pytest.mark.parametrize(("max_tokens", "goes_on"), [(10, False), (11, True)])
def test_never_hopes_for_the_length_of_max_tokens_and_no_more(max_tokens: int, goes_on: bool) -> None:
    """Two are finished with a score of -0.24. The live one has -2.5: that is -0.25 over 10 tokens, -0.227 over 11."""
    beams = Beams(BeamSearchParams(2, max_tokens, early_stopping="never"), eos_token_ids=[0])
    beams.advance(torch.tensor([[-0.24, -0.25, -9.0]]))
    assert bool(beams.advance(torch.tensor([[-0.23, -2.25, -9.0], [-9.0, -9.0, -9.0]]))) == goes_on


def test_prompts_of_one_batch_know_nothing_of_each_other() -> None:
    models = [toy(seed, 9) for seed in range(3)]
    params = [BeamSearchParams(3, 4), BeamSearchParams(1, 9), BeamSearchParams(4, 7, early_stopping=True)]
    together = [Beams(one, eos_token_ids=[4]) for one in params]
    while any(not beams.done for beams in together):
        sizes = [len(beams.live) for beams in together]  # 0 for one that is done
        rows = [model(tokens) for model, beams in zip(models, together, strict=True) for tokens in beams.live]
        for beams, part in zip(together, torch.tensor(rows).split(sizes), strict=True):
            if not beams.done:
                beams.advance(part)
    alone = [run(model, one, ends=[4]) for model, one in zip(models, params, strict=True)]
    assert [beams.best() for beams in together] == [beams.best() for beams in alone]


def test_banned_tokens_are_never_chosen() -> None:
    banned = -math.inf
    beams = Beams(BeamSearchParams(beam_width=3, max_tokens=9), eos_token_ids=[3])
    assert beams.advance(torch.tensor([[banned, -1.0, banned, banned]])) == [Branch(0, 1, -1.0)]
    assert beams.advance(torch.tensor([[-1.0, banned, banned, -2.0]])) == [Branch(0, 0, -2.0)]
    assert beams.advance(torch.full((1, 4), banned)) == []
    assert beams.done and [one.token_ids for one in beams.best()] == [(1, 3)]


def test_nan_is_an_error_of_one_line_that_names_the_beam() -> None:
    beams = Beams(BeamSearchParams(beam_width=2, max_tokens=9))
    beams.advance(torch.tensor([[-1.0, -2.0, -3.0]]))
    with pytest.raises(SamplingError, match=r"^log-probabilities of beam 1 hold NaN: check the weights and dtype$"):
        beams.advance(torch.tensor([[-1.0, -2.0, -3.0], [math.nan] * 3]))


def test_rows_that_are_not_those_of_the_live_beams_are_refused() -> None:
    beams = Beams(BeamSearchParams(beam_width=2, max_tokens=1))
    for wrong in (torch.zeros(2, 5), torch.zeros(5), torch.zeros(1, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="at 1 live rows"):
            beams.advance(wrong)
    beams.advance(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="done"):
        beams.advance(torch.zeros(1, 5))


# What a user may ask


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_width", 0), ("beam_width", 2.0), ("beam_width", True), ("beam_width", None),
        ("max_tokens", 0), ("max_tokens", None), ("max_tokens", "16"),
        ("length_penalty", math.nan), ("length_penalty", math.inf), ("length_penalty", "1"), ("length_penalty", False),
        ("early_stopping", "always"), ("early_stopping", 1), ("early_stopping", None),
        ("ignore_eos", 1), ("stop_token_ids", 7), ("stop_token_ids", [-1]), ("stop_token_ids", [True]),
        ("n", 0), ("n", 5), ("n", 1.0),
    ],
)  # fmt: skip
def test_a_bad_value_is_an_error_of_one_line_with_field_value_and_remedy(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        BeamSearchParams(**{"beam_width": 4, "max_tokens": 16, field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}={value!r} ({type(value).__name__}) is not allowed: give ")
    assert "\n" not in message and getattr(caught.value, "field", None) == field


def test_parameters_are_plain_values_that_compare() -> None:
    given_ids = [7, 3, 7]
    params = BeamSearchParams(beam_width=4, max_tokens=16, stop_token_ids=given_ids)
    assert params.stop_token_ids == (7, 3)
    assert params == BeamSearchParams(4, 16, 1.0, False, stop_token_ids=(7, 3)) and hash(params)
    assert replace(params, max_tokens=2).max_tokens == 2
