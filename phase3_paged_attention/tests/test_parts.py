"""What every list of work must be, whoever planned it: the solution, the framework, or the learner (`IMPL=mine`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase3_paged_attention.work_list import Work

CPU = torch.device("cpu")
Rows = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def plan_work(part):
    return part("work").plan_work


def rows(lists: torch.Tensor) -> Rows:
    return [tuple(row) for row in lists.tolist() if row[0] >= 0]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, Any]]:
    sizes = draw(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 15, 90, 3000])), min_size=1, max_size=8))
    options = {
        "group": 4,
        "kv_heads": 2,
        "window": draw(st.sampled_from([None, 1, 7, 100])),
        "programs": draw(st.sampled_from([1, 8, 300])),
        "block_n": draw(st.sampled_from([16, 64])),
        "tokens": draw(st.sampled_from([1, 4, 16])),
        "capacity": draw(st.sampled_from([None, None, 3, 200])),
        "device": CPU,
    }
    return [new for new, _ in sizes], [new + old for new, old in sizes], options


@settings(max_examples=60, deadline=None, derandomize=True)
@given(step=steps())
def test_a_tile_reads_each_key_that_it_may_see_once_and_its_parts_are_merged(plan_work, step) -> None:
    queries, lengths, options = step
    work: Work = plan_work(queries, lengths, **options)
    assert (work.tokens, work.items.dtype, work.merges.dtype) == (options["tokens"], torch.int32, torch.int32)
    tiles: dict[tuple[int, ...], Rows] = {}
    for item in rows(work.items):
        tiles.setdefault(item[:2], []).append(item[2:])
    assert sorted(tiles) == [(b, t) for b, new in enumerate(queries) for t in range(0, new, options["tokens"])]
    slots = []
    for (b, first), parts in tiles.items():
        old, window = lengths[b] - queries[b], options["window"] or 10**9
        reach = iter(sorted(parts))
        position, stop = max(0, old + first + 1 - window), old + min(first + options["tokens"], queries[b])
        for begin, end, slot, splits in reach:
            assert begin == position < end and splits == len(parts)
            assert (slot >= 0) == (len(parts) > 1)
            position = end
            slots += [slot] * (slot >= 0)
        assert position == stop
    assert sorted(slots) == list(range(len(slots))) and len(slots) <= work.slots
    split = {tile: (min(part[2] for part in parts), len(parts)) for tile, parts in tiles.items() if len(parts) > 1}
    assert {row[:2]: row[2:] for row in rows(work.merges)} == split
    assert len(work.counters) >= 2 * len(split) and not work.counters.any()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(step=steps())
def test_lists_with_a_capacity_have_the_size_that_they_were_promised(plan_work, step) -> None:
    queries, lengths, options = step
    capacity = options["capacity"] = options["capacity"] or 50
    tiles = sum(-(-new // options["tokens"]) for new in queries)
    assert len(plan_work(queries, lengths, **options).items) == max(capacity, tiles)


def test_sequences_keep_the_numbers_that_they_have_in_the_batch(plan_work) -> None:
    options = {"group": 4, "kv_heads": 2, "window": None, "programs": 16, "block_n": 16, "tokens": 1, "device": CPU}
    work = plan_work([1, 1], [3000, 5], sequences=[7, 2], **options)
    assert {row[0] for row in rows(work.items)} == {7, 2}
    assert {row[0] for row in rows(work.merges)} <= {7}


def test_bits_speak_of_64_new_tokens_and_of_no_more() -> None:
    """The oracle of every kernel: a token beyond the 64th is seen by nobody who has bits, not even by itself."""
    from phase3_paged_attention.kernels.reference import visible_keys

    bits = torch.full((70,), -(1 << 63) | 1)  # the first and the last bit
    bits[69] = -1
    seen = visible_keys(70, 72, None, bits)
    assert [seen[row].nonzero().flatten().tolist() for row in (0, 5, 63, 64, 68)] == [[0, 1, 2]] * 2 + [
        [0, 1, 2, 65]
    ] * 3
    assert seen[69].all()
