"""What every block of the KV memory holds, drawn on a terminal and as an image, from a plain snapshot.

A live engine or the simulator makes the snapshot. The grid's rows are a power of two of blocks wide, so that buddies
lie in straight lines. Requests differ in colour, a block of several requests is marked with their number, the last
block of a request shows how full it is, and holes are empty.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phase1_memory.block_tables import runs_of

if TYPE_CHECKING:
    from rich.text import Text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FREE, UNKNOWN, EMPTY = "·", "?", "_"
LEVELS = "▁▂▃▄▅▆▇"  # eighths
NAMED = 12  # requests that the terminal lists
MOST_CELLS = 4096  # that a drawing has; a larger memory shows several blocks as one


@dataclass(frozen=True)
class MemorySnapshot:
    """The memory at one moment.

    Attributes:
        num_blocks: physical blocks 0 .. num_blocks - 1.
        page: tokens in a block.
        tables: the blocks of each request in the order of its tokens; several requests may have the same block.
        lengths: tokens that each request has stored; a table may be longer than they need.
        free: blocks that can be given out. What is in no table and not free is held by something else.

    Raises:
        ValueError: a block that is out of range, or free and in use; a length that the table cannot hold.
    """

    num_blocks: int
    page: int
    tables: dict[str, tuple[int, ...]]
    lengths: dict[str, int]
    free: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.page < 1:
            raise ValueError(f"num_blocks={self.num_blocks}, page={self.page}: both must be at least 1")
        if self.tables.keys() != self.lengths.keys():
            raise ValueError(f"tables of {list(self.tables)}, lengths of {list(self.lengths)}: not the same requests")
        free = set(self.free)
        for name, table in (*self.tables.items(), ("free", self.free)):
            wrong = [block for block in table if not 0 <= block < self.num_blocks]
            if wrong:
                raise ValueError(f"{name}: block {wrong[0]} is not one of {self.num_blocks}")
        for name, table in self.tables.items():
            if not free.isdisjoint(table):
                raise ValueError(f"block {min(free.intersection(table))} is free and in use by {name}")
            if not 0 <= self.lengths[name] <= len(table) * self.page:
                raise ValueError(f"{name}: {self.lengths[name]} tokens in {len(table)} blocks of {self.page}")


@dataclass(frozen=True)
class Cell:
    """A block, or several that are drawn as one.

    Attributes:
        owner: place of its first request in `tables`; -1: free, -2: not free and in no table.
        references: requests that have it in their table.
        fill: share of its slots that hold a token.
    """

    owner: int
    references: int
    fill: float


def cells(snapshot: MemorySnapshot) -> list[Cell]:
    """One for each block; a block that several requests share is as full as the request that uses most of it."""
    owner = [-2] * snapshot.num_blocks
    references = [0] * snapshot.num_blocks
    tokens = [0] * snapshot.num_blocks
    for block in snapshot.free:
        owner[block] = -1
    for number, (name, table) in enumerate(snapshot.tables.items()):
        for place, block in enumerate(table):
            stored = min(snapshot.page, max(0, snapshot.lengths[name] - place * snapshot.page))
            owner[block] = owner[block] if references[block] else number
            references[block] += 1
            tokens[block] = max(tokens[block], stored)
    return [Cell(*row) for row in zip(owner, references, (t / snapshot.page for t in tokens), strict=True)]


def grouped(blocks: Sequence[Cell], size: int) -> list[Cell]:
    """Cells of `size` blocks: the owner that has most of them, the most references, the mean fill."""
    return [_merged(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def terminal_map(snapshot: MemorySnapshot, width: int = 80, *, colour: bool = True, rows: int = 64) -> Text:
    """The grid with its legend as rich text of at most `width` columns, which prints without colours as well.

    Args:
        snapshot: of the memory.
        width: columns of the terminal, at least 20.
        colour: colour by request, and the fill of a last block as the height of a bar. Without: a letter for the
            request, small where the block is not full.
        rows: of the grid at most; where there are more blocks, several are drawn as one.
    """
    from rich.text import Text

    digits = len(str(snapshot.num_blocks - 1))
    per_row = 1 << (max(20, width) - digits - 1).bit_length() - 1
    size = _group(snapshot.num_blocks, per_row * rows)
    drawn = grouped(cells(snapshot), size)
    text = Text(no_wrap=True)
    for start in range(0, len(drawn), per_row):
        text.append(f"{start * size:>{digits}} ", style="dim" if colour else "")
        for cell in drawn[start : start + per_row]:
            text.append(*(_coloured(cell) if colour else (_plain(cell), "")))
        text.append("\n")
    for line in (*_legend(snapshot, size, colour, max(20, width)), *_requests(snapshot)):
        text.append(line[: max(20, width)].rstrip() + "\n")
    return text


def describe(snapshot: MemorySnapshot) -> str:
    """One line: blocks by what they hold, and the holes."""
    blocks = cells(snapshot)
    used = [cell for cell in blocks if cell.references]
    partial = [cell.fill for cell in used if cell.fill < 1]
    holes = runs_of(snapshot.free)
    parts = [f"{snapshot.num_blocks} blocks of {snapshot.page}", f"{len(used) - len(partial)} full"]
    filled = f" ({sum(partial) / len(partial):.0%} filled)" if partial else ""
    parts.append(f"{len(partial)} not full{filled}")
    parts.append(f"{sum(cell.references > 1 for cell in used)} shared")
    largest = max((hole.length for hole in holes), default=0)
    parts.append(f"{len(snapshot.free)} free in {len(holes)} hole{'s' * (len(holes) != 1)}, largest {largest}")
    other = snapshot.num_blocks - len(used) - len(snapshot.free)
    return ", ".join(parts + ([f"{other} held otherwise"] if other else []))


def image_map(snapshot: MemorySnapshot, path: Path, *, title: str = "") -> tuple[Path, Path]:
    """Draw the grid; returns the paths of the SVG and the PNG.

    A request's colour fills a block from below as far as it holds tokens, and is pale above; a shared block is hatched;
    a free one is white. A request is named where its run is long enough for the name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from module0_profiling import plots

    size = _group(snapshot.num_blocks, MOST_CELLS)
    drawn = grouped(cells(snapshot), size)
    per_row = _columns(len(drawn))
    rows = -(-len(drawn) // per_row)
    drawing = Figure(figsize=(9.0, 1.1 + 8.3 * rows / per_row), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    axes.set(xlim=(-0.1, per_row + 0.1), ylim=(rows + 0.1, -0.1), aspect="equal")
    axes.set_title(title or describe(snapshot), fontsize=8)
    ticks = range(0, rows, max(1, rows // 16))
    axes.set_yticks([row + 0.5 for row in ticks], [str(row * per_row * size) for row in ticks], fontsize=7)
    axes.set_xticks([])
    axes.set_frame_on(False)  # where the last row ends, the memory ends
    axes.set_xlabel(f"block; {per_row * size} in a row" + (f", {size} in a cell" if size > 1 else ""), fontsize=8)
    _paint(axes, drawn, per_row)
    _write_names(axes, drawn, list(snapshot.tables), per_row, points=8.0 * 72 / per_row)
    _explain(drawing, drawn)
    return plots.save(drawing, path, plots.digest_of((snapshot, title)))


def _group(num_blocks: int, most: int) -> int:
    """The smallest power of two of blocks a cell that needs at most `most` cells."""
    size = 1
    while -(-num_blocks // size) > most:
        size *= 2
    return size


def _merged(group: Sequence[Cell]) -> Cell:
    counts: dict[int, int] = {}
    for cell in group:
        counts[cell.owner] = counts.get(cell.owner, 0) + 1
    owner = max(counts, key=lambda number: (counts[number], number))
    return Cell(owner, max(cell.references for cell in group), sum(cell.fill for cell in group) / len(group))


def _mark(references: int) -> str:
    return str(references) if references < 10 else "+"


def _plain(cell: Cell) -> str:
    if cell.owner < 0:
        return FREE if cell.owner == -1 else UNKNOWN
    if cell.references > 1:
        return _mark(cell.references)
    letter = LETTERS[cell.owner % len(LETTERS)]
    return letter if cell.fill == 1 else letter.lower() if cell.fill else EMPTY


def _coloured(cell: Cell) -> tuple[str, str]:
    if cell.owner < 0:
        return (FREE if cell.owner == -1 else UNKNOWN), "dim"
    colour = _colour(cell.owner)
    if cell.references > 1:
        return _mark(cell.references), f"bold black on {colour}"
    if cell.fill == 1:
        return LETTERS[cell.owner % len(LETTERS)], f"black on {colour}"
    return (LEVELS[min(6, math.ceil(cell.fill * 8) - 1)] if cell.fill else EMPTY), colour


def _colour(owner: int) -> str:
    from module0_profiling.plots import COLOURS

    return COLOURS[owner % (len(COLOURS) - 1)]  # the last is black, which is the colour of letters and frames


def _legend(snapshot: MemorySnapshot, size: int, colour: bool, width: int) -> list[str]:
    partial = f"{LEVELS[0]}{LEVELS[3]}{LEVELS[6]}" if colour else "a"
    signs = f"A full, {partial} not full, {EMPTY} not begun, 2 shared by two, {FREE} free"
    scale = [f"A character is {size} blocks."] if size > 1 else []
    again = ["Letters repeat."] if len(snapshot.tables) > len(LETTERS) else []
    return [line for part in (describe(snapshot), signs, *scale, *again) for line in textwrap.wrap(part, width)]


def _requests(snapshot: MemorySnapshot) -> list[str]:
    lines = []
    for number, (name, table) in enumerate(list(snapshot.tables.items())[:NAMED]):
        pieces = len(table) and 1 + sum(after != block + 1 for block, after in pairwise(table))
        held = f"{len(table)} block{'s' * (len(table) != 1)} in {pieces} piece{'s' * (pieces != 1)}"
        lines.append(f"{LETTERS[number % len(LETTERS)]} {name}: {snapshot.lengths[name]} tokens, {held}")
    left = len(snapshot.tables) - NAMED
    return [*lines, f"and {left} more"] if left > 0 else lines


def _columns(count: int) -> int:
    """A power of two that makes the grid at least as wide as high."""
    columns = 16
    while columns * columns < count:
        columns *= 2
    return columns


def _paint(axes: Any, drawn: Sequence[Cell], per_row: int) -> None:
    """Frames, pale blocks, and on them the filled parts; shared ones hatched."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    def add(chosen: list[tuple[Any, str]], **style: Any) -> None:
        colours = [colour for _, colour in chosen]
        axes.add_collection(PatchCollection([patch for patch, _ in chosen], facecolors=colours, **style))

    places = [(index % per_row, index // per_row, cell) for index, cell in enumerate(drawn)]
    used = [(x, y, cell) for x, y, cell in places if cell.owner >= 0]
    width = 0.4 if len(drawn) <= 1024 else 0.15
    frames = {-1: "white", -2: "#DDDDDD"}
    add([(Rectangle((x, y), 1, 1), _colour(cell.owner)) for x, y, cell in used], alpha=0.25, linewidth=0)
    filled = [(Rectangle((x, y + 1 - cell.fill), 1, cell.fill), _colour(cell.owner)) for x, y, cell in used]
    add(filled, linewidth=0)
    shared = [(Rectangle((x, y), 1, 1), "none") for x, y, cell in used if cell.references > 1]
    add(shared, hatch="////", edgecolor="black", linewidth=width)
    others = [(Rectangle((x, y), 1, 1), frames[cell.owner]) for x, y, cell in places if cell.owner < 0]
    add(others, edgecolor="#BBBBBB", linewidth=width)
    frame = [(Rectangle((x, y), 1, 1), "none") for x, y, cell in used]
    add(frame, edgecolor="#444444", linewidth=width)


def _write_names(axes: Any, drawn: Sequence[Cell], names: Sequence[str], per_row: int, *, points: float) -> None:
    """Each request's name once, in the first of its runs within a row that is long enough; `points` a cell is wide."""
    height = min(7.0, 0.75 * points)
    written: set[int] = set()
    start = 0
    while start < len(drawn) and height >= 3.5:
        cell, end = drawn[start], start + 1
        while end < len(drawn) and end % per_row and drawn[end].owner == cell.owner:
            end += 1
        needed = 0.7 * height * len(names[cell.owner]) if cell.owner >= 0 else 0
        if cell.owner >= 0 and cell.owner not in written and needed <= (end - start) * points:
            written.add(cell.owner)
            x, y = (start % per_row + end - start + start % per_row) / 2, start // per_row + 0.5
            box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3}
            axes.text(x, y, names[cell.owner], fontsize=height, ha="center", va="center", bbox=box)
        start = end


def _explain(drawing: Any, drawn: Sequence[Cell]) -> None:
    """A legend below the grid, of what there is."""
    from matplotlib.patches import Patch

    signs = [Patch(facecolor=_colour(0), edgecolor="#444444", label="holds tokens (a colour a request)")]
    signs.append(Patch(facecolor=_colour(0), alpha=0.25, label="given, not filled yet"))
    if any(cell.references > 1 for cell in drawn):
        signs.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="shared"))
    signs.append(Patch(facecolor="white", edgecolor="#BBBBBB", label="free"))
    if any(cell.owner == -2 for cell in drawn):
        signs.append(Patch(facecolor="#DDDDDD", edgecolor="#BBBBBB", label="held otherwise"))
    drawing.legend(handles=signs, loc="outside lower center", ncols=len(signs), fontsize=8, frameon=False)
