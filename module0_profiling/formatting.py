"""How a figure is written for people: three digits, the unit's own prefix, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from module0_profiling.results import Figure, Result

PREFIXED = ("bytes/s", "FLOP/s", "bytes", "FLOP")
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def value_with_unit(figure: Figure) -> str:
    """ "12.4 x", "1,234 tokens/s", "31.0 GB/s", "8.14 ms", "85.3 %", "17"."""
    value, unit = figure.value, figure.unit
    if unit == "s" and value:
        size, name = next((pair for pair in SECONDS if abs(value) >= pair[0]), SECONDS[-1])
        return f"{digits(value / size)} {name}"
    if unit in PREFIXED:
        size, prefix = next((pair for pair in PREFIXES if abs(value) >= pair[0]), PREFIXES[-1])
        return f"{digits(value / size)} {prefix}{unit.replace('bytes', 'B')}"
    return f"{digits(value)} {unit}".rstrip()


def digits(value: float) -> str:
    """Three significant digits; whole numbers and everything above a thousand in full, with separators."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 0.01:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.2e}"


def is_grid(figures: Sequence[Figure]) -> bool:
    """Whether every name is "row/column", so that the figures form a grid."""
    return len(figures) > 1 and all("/" in figure.name.strip("/") for figure in figures)


def cell_of(figure: Figure) -> tuple[str, str]:
    """Row and column of a figure: its name up to and after the first slash."""
    row, _, column = figure.name.partition("/")
    return row.strip(), column.strip()


def markdown_table(result: Result, *, layout: str = "auto") -> str:
    """The figures of a result as a Markdown table, with a line below that says where and how they were measured.

    `layout`: "grid" puts names "row/column" into rows and columns, "list" gives a line each, "auto" takes the grid when
    every name allows it.
    """
    grid = layout == "grid" or (layout == "auto" and is_grid(result.figures))
    rows = _grid(result.figures) if grid else _list(result.figures)
    lines = [_line(rows[0]), _line(["---"] + ["---:"] * (len(rows[0]) - 1)), *map(_line, rows[1:])]
    spreads = [figure.spread for figure in result.figures if figure.spread is not None]
    if grid and spreads:
        lines += ["", f"Largest spread between rounds: {max(spreads):.0%}."]
    return "\n".join([*lines, "", f"*{machine_line(result)}. Command: `{result.command}`*"])


def machine_line(result: Result) -> str:
    """Where a result comes from, in one line: processor, versions, commit and date."""
    processor = result.device.get(result.device.get("used", "cpu")) or {}
    gpu = processor.get("kind") == "cuda"
    parts = [str(processor.get("name", "unknown machine"))]
    if processor.get("units"):
        parts.append(f"{processor['units']} {'SMs' if gpu else 'cores'}")
    parts += processor.get("features") or []
    if processor.get("driver"):
        parts.append(f"driver {processor['driver']}")
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    commit, dirty = result.commit.partition("-")[::2]
    commit = commit[:10] + (" with uncommitted changes" if dirty else "")
    return f"{', '.join(parts)}; {versions}; commit {commit}; {result.date[:10]}"


def _list(figures: Sequence[Figure]) -> list[list[str]]:
    with_spread = any(figure.spread is not None for figure in figures)
    with_note = any(figure.note for figure in figures)
    rows = [["figure", "value", *(["spread"] * with_spread), *(["note"] * with_note)]]
    for figure in figures:
        row = [figure.name, value_with_unit(figure)]
        if with_spread:
            row.append("" if figure.spread is None else f"{figure.spread:.0%}")
        rows.append([*row, *([figure.note] * with_note)])
    return rows


def _grid(figures: Sequence[Figure]) -> list[list[str]]:
    cells = {cell_of(figure): value_with_unit(figure) for figure in figures}
    columns = list(dict.fromkeys(column for _, column in cells))
    names = list(dict.fromkeys(row for row, _ in cells))
    return [["", *columns]] + [[name, *(cells.get((name, column), "") for column in columns)] for name in names]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
