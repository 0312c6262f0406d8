"""What a launch of a paged kernel is told to do: a list of fixed length, so that a CUDA graph can replay it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Work:
    """Items of work on the device. A tile is some new tokens of one sequence, with the query heads of one KV head.

    Attributes:
        items: [capacity, 6] int32: sequence (-1: nothing to do), first new token of the tile within its sequence, begin
            and end of the cached tokens to read, place of the partial result (-1: the item writes the result itself),
            splits of the tile.
        merges: [merge capacity, 4] int32: sequence (-1: none), first new token of the tile, place of its first partial
            result, splits.
        counters: [merge capacity * Hkv] int32 zeros: arrivals, where the last block to arrive merges; it leaves zeros.
        tokens: new tokens of a tile.
        slots: partial results that a launch may write, for each KV head.
    """

    items: Tensor
    merges: Tensor
    counters: Tensor
    tokens: int
    slots: int
