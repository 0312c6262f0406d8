"""`titan trace`: a recorded timeline as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

    from module0_profiling.traces import Trace

WIDEST_NAME = 44


def trace(
    file: Annotated[Path, typer.Argument(help="Chrome trace of torch.profiler, or nsys export --type sqlite.")],
    top: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 10,
) -> None:
    """What took the time in a recorded timeline, how busy the processor was, and what it waited for."""
    from rich.console import Console

    from module0_profiling import traces

    console = Console()
    found = traces.read(file)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for drawn in tables(found, top):
        console.print(drawn)
    console.print(summary(found), markup=False, highlight=False)


def tables(found: Trace, top: int) -> list[Table]:
    """The tables of a trace that have rows, ready to print."""
    from module0_profiling import traces

    on_gpu = bool(len(found.kernels) or len(found.memcpy))
    ran = found.kernels if on_gpu else traces.self_times(found)
    title = "kernels" if on_gpu else "operators, each without those that it calls"
    drawn = [_table(title, traces.by_time(ran, top))]
    if on_gpu:
        drawn.append(_table("copies and fills", traces.memcpy_by_kind(found).head(top)))
        drawn.append(_table("launches on the CPU", traces.by_time(found.launches, top)))
        overhead = traces.launch_overhead(found)
        if len(overhead):
            columns = ["call", "delay", "duration"]
            each = overhead[columns].describe(percentiles=[0.5, 0.9]).loc[["mean", "50%", "90%", "max"]]
            drawn.append(_table("launch of a kernel", each.rename_axis("of all kernels").reset_index()))
    drawn.append(_table("ranges", traces.by_time(found.ranges, top).drop(columns="share")))
    drawn.append(_table("idle time: what the CPU did meanwhile", traces.idle_by_cause(found, top)))
    drawn.append(_table("longest gaps", traces.gaps(found, min(top, 5))))
    return [table for table in drawn if table.row_count]


def summary(found: Trace) -> str:
    """One line: the window and its busy share."""
    from module0_profiling import traces

    measured = traces.busy(found)
    what = "kernels or copies" if len(found.kernels) or len(found.memcpy) else "operators"
    return (
        f"{found.source}: {_seconds(measured.wall)} in all, {100 * measured.share:.1f} % with {what} running, "
        f"{_seconds(measured.idle)} idle."
    )


def _table(title: str, rows: DataFrame) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    cells = [
        [_cell(column, value) for column, value in zip(rows.columns, row, strict=True)]
        for row in rows.itertuples(index=False)
    ]
    for i, column in enumerate(rows.columns):
        if (i == 0 and column != "start") or column == "doing":
            drawn.add_column(column, overflow="fold")
        else:  # a figure is shown whole, whatever the width of the terminal
            widest = max((len(line[i]) for line in cells), default=0)
            drawn.add_column(column, justify="right", no_wrap=True, min_width=max(widest, len(column)))
    for line in cells:
        drawn.add_row(*map(Text, line))
    return drawn


def _cell(column: str, value: object) -> str:
    if isinstance(value, str):
        return value if len(value) <= WIDEST_NAME else value[: WIDEST_NAME - 1] + "…"
    assert isinstance(value, int | float)
    if column == "share":
        return f"{100 * value:.1f} %"
    if column in ("calls", "gaps"):
        return f"{value:,}"
    if column in ("bytes", "rate"):
        return f"{value / 1e6:,.2f} MB" + ("/s" if column == "rate" else "")
    return _seconds(value)


def _seconds(value: float) -> str:
    return f"{value * 1e6:,.1f} µs" if abs(value) < 1e-3 else f"{value * 1e3:,.2f} ms"


def register(app: typer.Typer) -> None:
    """Add the command to `titan`."""
    app.command()(trace)
