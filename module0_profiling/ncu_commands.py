"""``titan ncu`` and ``titan ncu-command``: take a kernel's hardware counters, and say what they mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from module0_profiling.ncu import KernelCounters


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.command("ncu")(ncu)
    app.command("ncu-command")(ncu_command)


def ncu(
    file: Annotated[Path, typer.Argument(help="What ncu --csv printed.")],
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    top: Annotated[int, typer.Option(help="At most so many kernels, slowest first.")] = 8,
) -> None:
    """What bounds each kernel of a Nsight Compute capture, why, and what to try."""
    from rich.console import Console

    from module0_profiling.ncu import NcuError
    from module0_profiling.ncu_csv import read

    console = Console()
    launches = [c for c in read(file) if kernel in c.kernel]
    if not launches:
        raise NcuError(f"{file} has no kernel whose name contains {kernel!r}")
    slowest = slowest_of_each(launches)
    console.print(table_of(slowest[:top]))
    for counters, _ in slowest[:top]:
        _explain(console.print, counters)
    if len(slowest) > top:
        console.print(f"{len(slowest) - top} more kernels: --top {len(slowest)}", style="dim")


def ncu_command(
    program: Annotated[list[str], typer.Argument(help="What to profile, after --, such as python -m package.module.")],
    kernel: Annotated[str, typer.Option(help="Regular expression of kernel names.")] = "",
    skip: Annotated[int, typer.Option(help="Launches to pass by first.")] = 0,
    count: Annotated[int, typer.Option(help="Launches to profile; 0: all.")] = 0,
    ncu_set: Annotated[str, typer.Option("--set", help="A set of ncu, such as full, instead of our metrics.")] = "",
    section: Annotated[list[str] | None, typer.Option(help="Sections of ncu instead of our metrics.")] = None,
    details: Annotated[bool, typer.Option("--details", help="The details page instead of the raw one.")] = False,
) -> None:
    """Print the ncu line that takes the counters which titan ncu reads. Runs nothing."""
    from module0_profiling.ncu import command

    page = "details" if details else "raw"
    line = command(program, kernel=kernel, skip=skip, count=count, ncu_set=ncu_set, sections=section or (), page=page)
    typer.echo(f"{line} > counters.csv")


def slowest_of_each(launches: list[KernelCounters]) -> list[tuple[KernelCounters, int]]:
    """(slowest launch, number of launches) of each kernel, by the time of all its launches, most first."""
    groups: dict[str, list[KernelCounters]] = {}
    for counters in launches:
        groups.setdefault(counters.kernel, []).append(counters)
    order = sorted(groups.values(), key=lambda group: -sum(c.seconds or 0.0 for c in group))
    return [(max(group, key=lambda c: c.seconds or 0.0), len(group)) for group in order]


def table_of(slowest: list[tuple[KernelCounters, int]]) -> Table:
    """One line a kernel, at most 80 columns; a dash is a metric that was not taken."""
    from rich import box
    from rich.table import Table

    from module0_profiling.ncu_verdict import judge

    table = Table(
        box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, caption=LEGEND, caption_justify="left"
    )
    table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=22)
    for column in ("n", "us", "DRAM%", "SM%", "TC%", "occ%", "ld", "st", "bank%"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for c, count in slowest:
        micros = c.seconds * 1e6 if c.seconds is not None else None
        conflicts = 100 * c.conflict_share if c.conflict_share is not None else None
        shares = (c.dram_percent, c.sm_percent, c.tensor_percent, c.achieved_occupancy)
        numbers = [_cell(micros, 1), *(_cell(x, 0) for x in shares)]
        numbers += [_cell(c.sectors_per_load, 1), _cell(c.sectors_per_store, 1), _cell(conflicts, 0)]
        table.add_row(short_name(c.kernel), str(count), *numbers, judge(c).bound)
    return table


LEGEND = (
    "n: launches, the slowest is shown. DRAM, SM, TC (tensor cores), occ: percent of peak.\n"
    "ld, st: sectors a request of a warp (4: 32-bit, 16: 128-bit, coalesced). bank: conflicts."
)


def short_name(kernel: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    name = re.split(r"[(<]", kernel, maxsplit=1)[0].strip()
    return name.rsplit(" ", maxsplit=1)[-1] or kernel


def _explain(write: object, counters: KernelCounters) -> None:
    from module0_profiling.ncu_verdict import judge

    assert callable(write)
    verdict = judge(counters)
    write(f"\n{short_name(counters.kernel)}: {verdict.bound}", style="bold", markup=False, highlight=False)
    for sign, sentences in (("  ", verdict.evidence), ("  try: ", verdict.to_try)):
        for sentence in sentences:
            write(f"{sign}{sentence}", markup=False, highlight=False, soft_wrap=True)
    if verdict.lacked:
        write(f"  not taken: {', '.join(verdict.lacked)}", style="dim", markup=False, soft_wrap=True)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
