"""The memory map: cells by hand, the text letter for letter, and drawings that are the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from phase1_memory.memory_map import Cell, MemorySnapshot, cells, describe, grouped, image_map, terminal_map
from phase1_memory.policies import Memory, make_policy
from phase1_memory.simulator import Setup, snapshot_at
from phase1_memory.traces import conversations

# Two sequences that share a prompt of 6 tokens, one alone with a block to spare, a block held by nobody, three free.
SHARED = MemorySnapshot(
    num_blocks=10,
    page=4,
    tables={"a": (0, 1), "b": (0, 5), "c": (2, 3, 4)},
    lengths={"a": 6, "b": 7, "c": 5},
    free=(6, 7, 9),
)


def printed(text: object, width: int, colours: str | None) -> str:
    console = Console(width=width, color_system=colours, force_terminal=colours is not None)
    with console.capture() as capture:
        console.print(text, end="")
    return capture.get()


def test_each_block_has_an_owner_its_references_and_its_fill() -> None:
    assert cells(SHARED) == [
        Cell(0, 2, 1.0),
        Cell(0, 1, 0.5),
        Cell(2, 1, 1.0),
        Cell(2, 1, 0.25),
        Cell(2, 1, 0.0),
        Cell(1, 1, 0.75),
        Cell(-1, 0, 0.0),
        Cell(-1, 0, 0.0),
        Cell(-2, 0, 0.0),
        Cell(-1, 0, 0.0),
    ]


def test_without_colours_letters_say_it() -> None:
    assert printed(terminal_map(SHARED, 80, colour=False), 80, None).splitlines() == [
        "0 2aCc_b··?·",
        "10 blocks of 4, 2 full, 4 not full (38% filled), 1 shared, 3 free in 2 holes,",
        "largest 2, 1 held otherwise",
        "A full, a not full, _ not begun, 2 shared by two, · free",
        "A a: 6 tokens, 2 blocks in 1 piece",
        "B b: 7 tokens, 2 blocks in 2 pieces",
        "C c: 5 tokens, 3 blocks in 1 piece",
    ]


def test_with_colours_bars_show_how_full_a_block_is() -> None:
    text = terminal_map(SHARED, 80)
    assert text.plain.splitlines()[0] == "0 2▄C▂_▆··?·"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans[:9]}
    assert styles["▄"] in styles["2"] and styles["▂"] in styles["C"] and styles["▂"] != styles["▄"]
    assert "\x1b[" in printed(text, 80, "truecolor") and "\x1b[" not in printed(text, 80, None)


@pytest.mark.parametrize("width", [20, 40, 79, 80, 200])
@pytest.mark.parametrize("colour", [False, True])
def test_thousands_of_blocks_stay_within_the_terminal(width: int, colour: bool) -> None:
    trace = conversations("sharegpt", 0, 400, 8.0)
    snapshot = snapshot_at(trace, make_policy("pages", Memory(16 * 8000)), Setup(), 300)
    lines = printed(terminal_map(snapshot, width, colour=colour), width, None).splitlines()
    assert max(map(len, lines)) <= width and len(lines) < 64 + 30
    grid = [line for line in lines if line.split()[0].isdigit() and len(line.split()) == 2]
    starts = [int(line.split()[0]) for line in grid]
    step = starts[1]
    assert step & (step - 1) == 0 and starts == list(range(0, 8000, step))


def test_a_character_of_several_blocks_is_the_request_that_has_most_of_them() -> None:
    three = [Cell(1, 1, 1.0), Cell(0, 2, 1.0), Cell(1, 1, 0.5), Cell(-1, 0, 0.0)]
    assert grouped(three, 4) == [Cell(1, 2, 0.625)]
    assert grouped(three, 1) == three
    assert grouped(three[:3], 2)[1] == Cell(1, 1, 0.5)


def test_one_line_counts_blocks_and_holes() -> None:
    empty = MemorySnapshot(8, 16, {}, {}, tuple(range(8)))
    assert describe(empty) == "8 blocks of 16, 0 full, 0 not full, 0 shared, 8 free in 1 hole, largest 8"
    full = MemorySnapshot(1, 2, {"a": (0,)}, {"a": 2}, ())
    assert describe(full) == "1 blocks of 2, 1 full, 0 not full, 0 shared, 0 free in 0 holes, largest 0"


@pytest.mark.parametrize(
    ("tables", "lengths", "free", "said"),
    [
        ({"a": (0, 4)}, {"a": 1}, (), "a: block 4 is not one of 4"),
        ({"a": (0,)}, {"a": 3}, (), "a: 3 tokens in 1 blocks of 2"),
        ({"a": (0, 1)}, {"a": 3}, (3, 1), "block 1 is free and in use by a"),
        ({"a": (0,)}, {}, (), "not the same requests"),
        ({}, {}, (-1,), "free: block -1"),
    ],
)
def test_a_snapshot_that_contradicts_itself_is_refused(
    tables: dict[str, tuple[int, ...]], lengths: dict[str, int], free: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        MemorySnapshot(4, 2, tables, lengths, free)


def test_the_image_is_the_same_twice_and_differs_for_another_memory(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = (image_map(SHARED, tmp_path / name / "map") for name in ("one", "two"))
    assert [path.suffix for path in first] == [".svg", ".png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    longer = MemorySnapshot(10, 4, SHARED.tables, SHARED.lengths | {"a": 7}, SHARED.free)
    assert image_map(longer, tmp_path / "three" / "map")[1].read_bytes() != first[1].read_bytes()


def test_the_image_fills_hatches_and_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    wide = MemorySnapshot(64, 16, {"long": tuple(range(8, 24))}, {"long": 250}, tuple(range(8)))
    svg = image_map(wide, tmp_path / "wide", title="one request")[0].read_text(encoding="utf-8")
    assert "long" in svg and "one request" in svg and "held otherwise" in svg and "shared" not in svg
    svg = image_map(SHARED, tmp_path / "shared")[0].read_text(encoding="utf-8")
    assert "shared" in svg and "<pattern" in svg  # a hatch


def test_thousands_of_blocks_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = conversations("sharegpt", 0, 400, 8.0)
    snapshot = snapshot_at(trace, make_policy("pages", Memory(16 * 10_000)), Setup(), 300)
    svg, png = image_map(snapshot, tmp_path / "large")
    assert "4 in a cell" in svg.read_text(encoding="utf-8") and png.stat().st_size > 10_000
