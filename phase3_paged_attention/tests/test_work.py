"""Planned work: everything that somebody sees is read once, nobody waits for one long item, lists keep their length.

Under `IMPL`, tests run that hold for any planner; gates say how well it splits. `test_parts.py` has more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase3_paged_attention.work import LEAST_BLOCKS
from phase3_paged_attention.work_list import Work

Plan = Callable[..., Work]
OPTIONS: dict[str, Any] = {
    "group": 4, "kv_heads": 2, "window": None, "programs": 16, "block_n": 16, "tokens": 4,
    "device": torch.device("cpu"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(part) -> Plan:
    """`plan_work` of the implementation under test, with options that a test need not repeat."""
    plan_work = part("work").plan_work
    return lambda queries, kv, **changes: plan_work(queries, kv, **(OPTIONS | changes))


@pytest.fixture(scope="module")
def plan_of_the_solution(plan, use) -> Plan:
    """As `plan`, for tests of how the solution splits."""
    if use.of("phase3_paged_attention") != "solution":
        pytest.skip("another planner may split otherwise, or not at all")
    return plan


def rows(lists: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in lists.tolist() if row[0] >= 0]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, Any]]:
    sizes = draw(
        st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 15, 90, 700, 3000])), min_size=1, max_size=8)
    )
    changes = {
        "window": draw(st.sampled_from([None, 1, 7, 100])),
        "programs": draw(st.sampled_from([1, 8, 64, 300])),
        "tokens": draw(st.sampled_from([1, 4, 16])),
        "capacity": draw(st.sampled_from([None, None, 3, 40, 200])),
    }
    return [new for new, _ in sizes], [new + old for new, old in sizes], changes


@settings(max_examples=80, deadline=None, derandomize=True)
@given(step=steps())
def test_every_key_that_a_tile_may_see_is_read_once(
    plan: Plan, step: tuple[list[int], list[int], dict[str, Any]]
) -> None:
    queries, kv, changes = step
    work = plan(queries, kv, **changes)
    tokens, window = changes["tokens"], changes["window"] or 10**9
    assert work.tokens == tokens and work.items.dtype == torch.int32

    read: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for item in rows(work.items):
        read.setdefault(item[:2], []).append(item[2:])
    assert sorted(read) == [(b, first) for b, new in enumerate(queries) for first in range(0, new, tokens)]
    for (b, first), parts in read.items():
        old, last = kv[b] - queries[b], min(first + tokens, queries[b]) - 1
        parts.sort()
        begins, ends, slots, splits = zip(*parts, strict=True)
        assert begins[0] == max(0, old + first + 1 - window) and ends[-1] == old + last + 1
        assert begins[1:] == ends[:-1] and all(begin < end for begin, end in zip(begins, ends, strict=True))
        assert set(splits) == {len(parts)}
        assert slots == ((-1,) if len(parts) == 1 else tuple(range(slots[0], slots[0] + len(parts))))

    merges = {(b, first): (parts[0][2], len(parts)) for (b, first), parts in read.items() if len(parts) > 1}
    assert {row[:2]: row[2:] for row in rows(work.merges)} == merges
    written = [slot for parts in read.values() for *_, slot, _ in parts if slot >= 0]
    assert sorted(written) == list(range(len(written))) and len(written) <= work.slots
    assert len(work.counters) >= 2 * len(merges) and not work.counters.any()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(step=steps())
def test_splits_have_one_length_and_no_more_of_them_than_the_programs_need(
    plan_of_the_solution: Plan, step: tuple[list[int], list[int], dict[str, Any]]
) -> None:
    queries, kv, changes = step
    work = plan_of_the_solution(queries, kv, **changes)
    items, share = rows(work.items), changes["programs"] // 2
    lengths = [end - begin for _, _, begin, end, _, _ in items]
    tiles = sum(-(-new // changes["tokens"]) for new in queries)
    assert lengths == sorted(lengths, reverse=True)  # the longest start first
    split = [item for item in items if item[5] > 1]
    assert len(items) <= max(tiles + share, changes["capacity"] or 0)
    if split:
        chunk = max(lengths)
        assert chunk % 16 == 0 and chunk >= 16 * LEAST_BLOCKS
        assert all(end - begin <= chunk for _, _, begin, end, _, _ in items)
        assert tiles > share or len(items) <= share  # one round


@settings(max_examples=60, deadline=None, derandomize=True)
@given(step=steps())
def test_captured_lists_keep_their_length(plan: Plan, step: tuple[list[int], list[int], dict[str, Any]]) -> None:
    queries, kv, changes = step
    capacity = changes["capacity"] = changes["capacity"] or 50
    tiles = sum(-(-new // changes["tokens"]) for new in queries)
    work = plan(queries, kv, **changes)
    assert len(work.items) == max(capacity, tiles)
    if tiles <= capacity:
        other = plan(queries, [n + 4000 for n in kv], **changes)
        for name in ("items", "merges", "counters"):
            assert getattr(other, name).shape == getattr(work, name).shape
        assert other.slots == work.slots


def test_a_batch_that_fills_the_programs_is_not_split(plan_of_the_solution: Plan) -> None:
    work = plan_of_the_solution([1] * 8, [4000] * 8, programs=16, tokens=1)
    assert rows(work.items) == [(b, 0, 0, 4000, -1, 1) for b in range(8)]
    assert len(work.merges) == work.slots == 0


def test_one_long_sequence_is_dealt_out_to_all_programs(plan_of_the_solution: Plan) -> None:
    work = plan_of_the_solution([1], [4000], programs=16, tokens=1)
    assert [end - begin for _, _, begin, end, _, _ in rows(work.items)] == [512] * 7 + [416]  # 8 for each of 2 heads


def test_one_long_sequence_among_many_short_ones_is_split_too(plan_of_the_solution: Plan) -> None:
    work = plan_of_the_solution([1] * 60, [32000] + [100] * 59, programs=16, tokens=1)
    assert len(rows(work.merges)) == 1
    assert max(end - begin for _, _, begin, end, _, _ in rows(work.items)) < 32000 / 6


def test_short_sequences_are_not_worth_a_merge(plan_of_the_solution: Plan) -> None:
    assert len(plan_of_the_solution([1], [64], programs=300, tokens=1).merges) == 0


def test_a_window_leaves_out_what_nobody_sees(plan: Plan) -> None:
    work = plan([1, 6], [5000, 100], window=50, tokens=4, programs=2)
    expected = [(0, 0, 4950, 5000, -1, 1), (1, 0, 45, 98, -1, 1), (1, 4, 49, 100, -1, 1)]
    assert sorted(rows(work.items)) == expected


def test_sequences_keep_their_numbers_in_the_batch(plan: Plan) -> None:
    work = plan([1, 1], [3000, 5], sequences=[7, 2], tokens=1)
    assert {row[0] for row in rows(work.items)} == {7, 2}
    assert {row[0] for row in rows(work.merges)} <= {7}
