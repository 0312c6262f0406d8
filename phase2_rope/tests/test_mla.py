"""Attention over latents against attention written out in float64 from the definition, through a paged cache."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_mask
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase2_rope import expanded as expansion
from phase2_rope import mla as solution
from phase2_rope.deepseek import LatentSpec
from phase2_rope.expanded import expanded

CPU = torch.device("cpu")
GARBAGE = 1e4
SPECS = {
    "all widths differ": LatentSpec(num_heads=3, latent=20, rope=6, nope=10, value=7, scale=0.3),
    "values wider than queries": LatentSpec(num_heads=2, latent=8, rope=2, nope=4, value=12, scale=0.5),
    "one head": LatentSpec(num_heads=1, latent=16, rope=4, nope=8, value=8, scale=0.2),
}
V3 = LatentSpec(num_heads=128, latent=512, rope=64, nope=128, value=128, scale=192**-0.5)


def definition(spec, q, entries, up):
    """Every head's keys and values from the latents, then softmax; q is the last tokens. float64, [Tq, H * V]."""
    q, entries, up = q.double(), entries.double(), up.double()
    past, out = len(entries) - len(q), torch.zeros(len(q), spec.num_heads, spec.value, dtype=torch.float64)
    for h in range(spec.num_heads):
        made = entries[:, : spec.latent] @ up[h].T
        keys = torch.cat((made[:, : spec.nope], entries[:, spec.latent :]), dim=1)
        for i in range(len(q)):
            seen = past + i + 1
            weights = (keys[:seen] @ q[i, h] * spec.scale).softmax(0)
            out[i, h] = weights @ made[:seen, spec.nope :]
    return out.flatten(1)


def inputs(spec, queries, keys, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, spec.num_heads, spec.query, generator=generator)
    entries = torch.randn(keys, spec.entry, generator=generator)
    up = torch.randn(spec.num_heads, spec.nope + spec.value, spec.latent, generator=generator) * spec.latent**-0.5
    return q.to(dtype), entries.to(dtype), up.to(dtype)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (4, 11)])
def test_both_forms_are_the_definition(form, name, queries, keys):
    spec = SPECS[name]
    q, entries, up = inputs(spec, queries, keys)
    attend = {"expanded": expanded, "absorbed": solution.absorbed}[form]
    out = attend(spec, q, entries, up, causal_mask(queries, keys, None, CPU))
    assert (out - definition(spec, q, entries, up)).abs().max() < 1e-5


def test_heads_that_are_expanded_in_groups_give_the_same(monkeypatch):
    spec = SPECS["all widths differ"]
    q, entries, up = inputs(spec, 4, 9)
    mask = causal_mask(4, 9, None, CPU)
    whole = expanded(spec, q, entries, up, mask)
    monkeypatch.setattr(expansion, "EXPANDED_BYTES", 1)  # one head at a time
    assert (expanded(spec, q, entries, up, mask) - whole).abs().max() < 1e-6


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_bfloat16_is_as_near_as_its_rounding(form):
    spec = LatentSpec(num_heads=16, latent=128, rope=16, nope=32, value=32, scale=48**-0.5)
    q, entries, up = inputs(spec, 40, 300, dtype=torch.bfloat16)
    attend = {"expanded": expanded, "absorbed": solution.absorbed}[form]
    out = attend(spec, q, entries, up, causal_mask(40, 300, None, CPU))
    exact = definition(spec, q, entries, up)
    assert (out - exact).abs().mean() / exact.abs().mean() < 0.02


# Through the cache

LATENTS = st.tuples(st.integers(0, 40), st.integers(1, 12))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sequences=st.lists(LATENTS, min_size=1, max_size=5),
    page=st.sampled_from([1, 4, 16]),
    scattered=st.booleans(),
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 99),
)
def test_any_step_reads_its_own_tokens_and_no_others(part, sequences, page, scattered, name, seed):
    check_step(part("mla").PagedLatentAttention(), SPECS[name], sequences, page, scattered, seed)


@pytest.mark.parametrize("page", [4, 16, 24])
def test_decodes_of_few_shapes_read_their_own_tokens(part, page):
    backend = part("mla").PagedLatentAttention().steady(64)
    check_step(backend, SPECS["one head"], [(5, 1), (40, 1), (16, 1)], page, True, 1)


def check_step(backend, spec, sequences, page, scattered, seed):
    decodes = [s for s in sequences if s[1] == 1 and s[0]]
    sequences = decodes + [s for s in sequences if s not in decodes]  # as the scheduler orders them
    pages = [-(-sum(s) // page) for s in sequences]
    places = list(range(2, 2 + sum(pages)))
    if scattered:
        random.Random(seed).shuffle(places)
    starts = [0, *accumulate(pages)]
    tables = [tuple(places[a:b]) for a, b in pairwise(starts)]
    cache = torch.full((3 + sum(pages), page, 1, spec.entry), GARBAGE)
    cases = [inputs(spec, new, cached + new, seed + i) for i, (cached, new) in enumerate(sequences)]
    up = cases[0][2]
    for (q, entries, _), table in zip(cases, tables, strict=True):
        assert len(q) <= len(entries)
        for token, entry in enumerate(entries):  # the step's own have been written by the layer
            cache[table[token // page], token % page, 0] = entry
    requests = [Request(str(i), [0] * sum(s), SamplingParams(), 0, (), 1) for i, s in enumerate(sequences)]
    step = Step(tuple(ScheduledRequest(r, *s) for r, s in zip(requests, sequences, strict=True)))
    batch = Batch.build(step, tables, page, CPU)
    plan = backend.plan(batch, frozenset({None}), page)
    q = torch.cat([case[0] for case in cases])
    entry = torch.cat([case[1][-new:] for case, (_, new) in zip(cases, sequences, strict=True)])
    out = backend.run(spec, q, entry, up, cache, plan)
    exact = torch.cat([definition(spec, q, entries, up) for q, entries, _ in cases])
    assert out.shape == exact.shape
    assert (out - exact).abs().max() < 1e-5


# Which form


@pytest.mark.parametrize(("queries", "keys", "less"), [(1, 1000, True), (170, 100_000, True), (172, 100_000, False)])
def test_the_break_even_of_deepseek_v3_is_at_171_queries(queries, keys, less):
    assert solution.absorbing_is_less(V3, queries, keys) is less
    assert V3.latent * (V3.nope + V3.value) // (2 * V3.latent - V3.nope - V3.value) == 170


@pytest.mark.parametrize("length", [1, 2, 64, 4096])
def test_a_prompt_with_nothing_before_it_is_expanded(length):
    assert not solution.absorbing_is_less(V3, length, length) or length == 1


@pytest.mark.parametrize(("queries", "keys"), [(1, 50), (3, 64), (20, 64), (64, 64)])
def test_the_rule_is_that_of_counted_work(queries, keys):
    """Torch's own counter sees both forms; it counts all pairs, so those below the diagonal are taken off."""
    spec = LatentSpec(num_heads=4, latent=64, rope=8, nope=16, value=16, scale=0.2)
    q, entries, up = inputs(spec, queries, keys)
    hidden = queries * (queries - 1) // 2 * 2 * spec.num_heads
    counted = {}
    for name, attend, widths in (
        ("absorbed", solution.absorbed, 2 * spec.entry),
        ("expanded", expanded, 2 * spec.query),
    ):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            attend(spec, q, entries, up, causal_mask(queries, keys, None, CPU))
        counted[name] = counter.get_total_flops() - hidden * widths
    # what was padded or is dropped behind: R of the entry as values, P + R - V of the query's width
    counted["absorbed"] -= 2 * spec.num_heads * (queries * keys - queries * (queries - 1) // 2) * spec.rope
    counted["expanded"] -= (
        2 * spec.num_heads * (queries * keys - queries * (queries - 1) // 2) * (spec.query - spec.value)
    )
    assert (counted["absorbed"] < counted["expanded"]) is solution.absorbing_is_less(spec, queries, keys)
