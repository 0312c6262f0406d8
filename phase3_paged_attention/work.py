"""Plans the work of a step: which program reads which part of which sequence, so that all are busy equally long.

A tile is some new tokens of one sequence; it reads the cached tokens that they may see. Where there are fewer tiles
than programs, or one is longer than a program's share, tiles are split along the cached tokens (Flash-Decoding, Dao et
al., 2023; the common size of splits: FlashInfer, arXiv 2501.01005). Long items come first: short ones fill the gaps.

All of it is arithmetic on the host and one copy to the device: it runs in every step, and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from phase3_paged_attention.work_list import Work

LEAST_BLOCKS = 4  # of a split: below, merging costs more than the split saves


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
        capacity: length of the lists, for a launch that is captured; splits get longer where it is small. Lists are
            longer than that only where there are more tiles.
        device: where the lists go.
    """
    queries = np.asarray(query_lens, dtype=np.int64)
    kv = np.asarray(kv_lens, dtype=np.int64)
    numbers = np.arange(len(queries)) if sequences is None else np.asarray(sequences, dtype=np.int64)

    tiles = -(-queries // tokens)  # of each sequence
    owner = np.arange(len(queries)).repeat(tiles)
    first = (np.arange(len(owner)) - (tiles.cumsum() - tiles)[owner]) * tokens
    old = (kv - queries)[owner]
    end = old + np.minimum(first + tokens, queries[owner])
    begin = np.zeros_like(end) if window is None else np.maximum(old + first + 1 - window, 0)
    length = end - begin

    chunk = _chunk(length, programs // kv_heads, block_n, capacity)
    splits = -(-length // chunk)
    parts = splits > 1
    slots = np.where(parts, splits, 0)
    first_slot = slots.cumsum() - slots

    tile = np.arange(len(owner)).repeat(splits)
    part = np.arange(len(tile)) - (splits.cumsum() - splits)[tile]
    start = begin[tile] + part * chunk
    stop = np.minimum(start + chunk, end[tile])
    slot = np.where(parts[tile], first_slot[tile] + part, -1)
    items = np.array((numbers[owner[tile]], first[tile], start, stop, slot, splits[tile]))
    items = items[:, (start - stop).argsort(kind="stable")]  # the longest first
    merges = np.array((numbers[owner], first, first_slot, splits))[:, parts]

    used, room, joined = int(slots.sum()), items.shape[1], merges.shape[1]
    if capacity is not None:
        # At most two splits for each program's share, since a tile that is split is longer than a share.
        used = min(max(capacity, room), max(used, 2 * programs // kv_heads))
        room, joined = max(capacity, room), max(1, used // 2)
    return Work(*_on_device(items, room, merges, joined, kv_heads, device), tokens=tokens, slots=used)


def _chunk(length: np.ndarray, share: int, block_n: int, capacity: int | None) -> int:
    """Cached tokens of a split: the smallest multiple of block_n with which the work fills the programs once.

    With few tiles that may leave one of them long, since most room is taken by short ones. Then splits of about a share
    are better, though they are more than run at once: longest first, the last to end has a share and a split at most.

    Args:
        length: cached tokens of each tile.
        share: items that run at once, each for all KV heads.
        block_n: see `plan_work`.
        capacity: items that there may be.
    """
    longest = int(length.max(initial=1))
    even = -(-int(length.sum()) // max(share, 1))  # cached tokens of a program, if all had as many
    if longest <= even or longest <= LEAST_BLOCKS * block_n:
        return longest
    most = len(length) + share  # a tile that is no longer than a share stays whole
    if capacity is not None:
        most = max(min(most, capacity), len(length))
    least = max(LEAST_BLOCKS, -(-even // block_n)) * block_n
    chunk = _smallest(length, least, most, block_n)
    if len(length) > share:
        return chunk
    once = _smallest(length, chunk, min(share, most), block_n)
    return once if once <= even + chunk else chunk


def _smallest(length: np.ndarray, least: int, room: int, block_n: int) -> int:
    """The smallest multiple of block_n, from `least` on, with which there are no more than `room` splits."""

    def fits(blocks: int) -> bool:
        return int((-(-length // (blocks * block_n))).sum()) <= room

    low, high = least // block_n, -(-int(length.max()) // block_n)
    if low < high and fits(low):  # it often does, where one long sequence is alone
        return low * block_n
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high * block_n


def _on_device(
    items: np.ndarray, room: int, merges: np.ndarray, joined: int, kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Both lists [fields, rows] as tables with `room` and `joined` rows, what is left of them -1, and counters."""
    sizes = [6 * room, 4 * joined, joined * kv_heads]
    flat = np.zeros(sum(sizes), dtype=np.int32)
    tables = flat[: sizes[0]].reshape(room, 6), flat[sizes[0] : sizes[0] + sizes[1]].reshape(joined, 4)
    for table, rows in zip(tables, (items, merges), strict=True):
        table[: rows.shape[1]] = rows.T
        table[rows.shape[1] :] = -1
    there = torch.from_numpy(flat)
    if device.type == "cuda":
        there = there.pin_memory().to(device, non_blocking=True)
    parts = there.split_with_sizes(sizes)
    return parts[0].view(room, 6), parts[1].view(joined, 4), parts[2]
