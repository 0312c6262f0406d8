"""Decodes in groups: as many sequences as a CPU's cache holds, of nearly one length, and only what a window shows.

A gather costs what it writes, half as much into memory that the cache holds already: so few tokens are gathered at
once. And a table that is filled up to the longest is gathered, and multiplied, for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phase1_memory.attention import neighbours

GROUP_TOKENS = 2048  # 2 MiB of bfloat16 keys and values for 4 heads of 64 numbers, 8 MiB for 8 of 128
PIECE_TOKENS = 4096  # of a sequence alone: longer ones come in pieces
SPARE_TOKENS = 256  # one more group costs as much as gathering about as many tokens that nobody reads


class Span(NamedTuple):
    """What a decode reads: tokens begin..end of its sequence, in the pages first..last - 1 of its table."""

    begin: int
    end: int
    first: int
    last: int


class Piece(NamedTuple):
    """What is gathered at once: `blocks` are [n] int64, or the first of n neighbours; places begin..end are read."""

    blocks: Tensor | int
    pages: int
    begin: int
    end: int


@dataclass(frozen=True)
class Group:
    """Decodes that are attended at once.

    Attributes:
        size: sequences.
        pieces: one, of all sequences, or those of one long sequence.
        hidden: [size, tokens] bool, true where a token may not be read; None: all may.
        filler: places of the same among the gathered tokens, int64.
    """

    size: int
    pieces: tuple[Piece, ...]
    hidden: Tensor | None = None
    filler: Tensor | None = None


@dataclass(frozen=True)
class Decodes:
    """All decodes of a step, for one window: their rows of q, [decodes] int64 or a slice, in the order of `groups`."""

    rows: Tensor | slice
    groups: tuple[Group, ...]


def group_decodes(
    rows: List[int],
    lengths: List[int],
    tables: List[tuple[int, ...]],
    window: int | None,
    page: int,
    device: torch.device,
) -> Decodes:
    """Sort decodes by their pages and cut them into groups; on the host, then one copy.

    Args:
        rows: of q, one for each decode.
        lengths: tokens of each sequence, the new one included.
        tables: its blocks.
        window: tokens that a query sees, itself included; None: all.
        page: tokens in a block.
        device: of the tensors.
    """
    spans = []
    for end in lengths:
        begin = 0 if window is None else max(0, end - window)
        spans.append(Span(begin, end, begin // page, -(-end // page)))
    order = sorted(range(len(rows)), key=lambda i: spans[i].first - spans[i].last)  # longest first
    numbers = [rows[i] for i in order]
    sizes = [len(order)]
    groups = cut(order, [span.last - span.first for span in spans], page)
    for members in groups:
        blocks, filler = _contents([spans[i] for i in members], [tables[i] for i in members], page)
        numbers += blocks + filler
        sizes += [len(blocks), len(filler)]
    decodes, *contents = torch.tensor(numbers, dtype=torch.int64).to(device).split(sizes)
    made = []
    for members, blocks_of, filler_of in zip(groups, contents[::2], contents[1::2], strict=True):
        span, table = spans[members[0]], tables[members[0]]
        if len(members) == 1:
            made.append(Group(1, _pieces(span, table[span.first : span.last], blocks_of, page)))
        else:
            made.append(_padded(len(members), span.last - span.first, blocks_of, filler_of, page))
    in_order = numbers[: len(order)] == list(range(len(order)))
    return Decodes(slice(len(order)) if in_order else decodes, tuple(made))


def cut(order: List[int], pages: List[int], page: int) -> list[list[int]]:
    """Groups of sequences, which come longest first: as many as are gathered at once, with little padding.

    Args:
        order: of the sequences.
        pages: of each sequence, by its index.
        page: tokens in a page.
    """
    groups: list[list[int]] = []
    spare = 0
    for i in order:
        if groups:
            longest, size = pages[groups[-1][0]], len(groups[-1])
            missing = (longest - pages[i]) * page
            if spare + missing <= SPARE_TOKENS and (size + 1) * longest * page <= GROUP_TOKENS:
                groups[-1].append(i)
                spare += missing
                continue
        groups.append([i])
        spare = 0
    return groups


def _contents(spans: List[Span], tables: List[tuple[int, ...]], page: int) -> tuple[list[int], list[int]]:
    """Blocks of a group, those of shorter sequences filled up with their last; places that are not to be read."""
    pages = spans[0].last - spans[0].first
    blocks: list[int] = []
    filler: list[int] = []
    for i, (span, table) in enumerate(zip(spans, tables, strict=True)):
        own = table[span.first : span.last]
        blocks += own + own[-1:] * (pages - len(own))
        if len(spans) > 1:
            start, zero = i * pages * page, span.first * page
            filler += range(start, start + span.begin - zero)
            filler += range(start + span.end - zero, start + pages * page)
    return blocks, filler


def _padded(size: int, pages: int, blocks: Tensor, filler: Tensor, page: int) -> Group:
    pieces = (Piece(blocks, pages, 0, pages * page),)
    if not len(filler):
        return Group(size, pieces)
    hidden = torch.zeros(size * pages * page, dtype=torch.bool, device=blocks.device)
    return Group(size, pieces, hidden.index_fill_(0, filler, True).view(size, -1), filler)


def _pieces(span: Span, table: tuple[int, ...], blocks: Tensor, page: int) -> tuple[Piece, ...]:
    """A sequence alone: nothing is padded, nothing hidden, and what lies in a run of blocks is read where it lies."""
    begin, end = span.begin - span.first * page, span.end - span.first * page
    if neighbours(table):
        return (Piece(table[0], len(table), begin, end),)
    step = max(1, PIECE_TOKENS // page)
    found = []
    for a in range(0, len(table), step):
        n = min(step, len(table) - a)
        found.append(Piece(blocks[a : a + n], n, begin if a == 0 else 0, min(end - a * page, n * page)))
    return tuple(found)
