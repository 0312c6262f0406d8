"""Plans the work of a step: a tile of new tokens is an item, whatever it has to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phase3_paged_attention.work_list import Work


def plan_work(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    group: int,
    kv_heads: int,
    window: int | None,
    programs: int,
    block_n: int,
    tokens: int,
    sequences: Sequence[int] | None = None,
    capacity: int | None = None,
    device: torch.device,
) -> Work:
    """The work of one launch.

    Args:
        query_lens: new tokens of each sequence, at least 1.
        kv_lens: its tokens with the new ones, which are the last.
        group: query heads for each KV head (Hq / Hkv); a tile has tokens * group rows.
        kv_heads: Hkv; every item is done once for each.
        window: tokens that a query sees, itself included; None: all.
        programs: what the device runs at once.
        block_n: cached tokens that a program reads at a time; a split is a multiple of it.
        tokens: new tokens of a tile.
        sequences: numbers of these sequences in the batch; None: 0, 1, ...
        capacity: length of the lists, for a launch that is captured. Lists are longer only where there are more tiles.
        device: where the lists go.
    """
    items = []
    numbers = range(len(query_lens)) if sequences is None else sequences
    for sequence, new, length in zip(numbers, query_lens, kv_lens, strict=True):
        old = length - new
        for first in range(0, new, tokens):
            begin = 0 if window is None else max(0, old + first + 1 - window)
            end = old + min(first + tokens, new)
            # TASK 3.2: one sequence of 100,000 tokens is one item, `kv_heads` programs on a device that runs `programs`
            # at once; and in a batch all wait for the longest. Which length should a part have, so that all are busy?
            # Say in `merges` whose partial results belong together.
            items.append((sequence, first, begin, end, -1, 1))
    items += [(-1,) * 6] * ((capacity or 0) - len(items))
    nothing = torch.empty(0, 4, dtype=torch.int32, device=device)
    # TASK 3.2: this runs in every step, before the first launch. A loop in Python is fine for a few sequences; for
    # hundreds numpy is faster.
    table = torch.tensor(items, dtype=torch.int32).view(-1, 6).to(device)
    return Work(table, nothing, nothing.flatten(), tokens, 0)
