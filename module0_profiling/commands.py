"""The `titan` commands of module 0: `doctor`, `peaks`, `kernels`, and those of the course."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from module0_profiling.hardware import Peaks


def doctor() -> None:
    """What this machine has, what is missing, why it matters and how to get it."""
    from rich.console import Console

    from module0_profiling.doctor import examine, table

    Console().print(table(examine()))


def peaks(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, forget the last measurement.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:<n> or mps; default: the fastest here.")] = "",
) -> None:
    """This machine's measured peaks: read and copy bandwidth, matmul rate per dtype, and the ridge between them."""
    from rich.console import Console

    from module0_profiling.hardware import DeviceError, cache_path, detect, measured_peaks

    console = Console()
    try:
        found = detect(device or None)
        with console.status(f"measuring {found.name}"):
            measured = measured_peaks(found, refresh=refresh)
    except (DeviceError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    console.print(peaks_table(measured))
    if measured.load > 0.5 * max(1, found.units) and found.kind == "cpu":
        console.print(
            f"Other processes were running (load {measured.load:.1f}): repeat with --refresh when it is quiet."
        )
    console.print(f"Kept in {cache_path()}", style="dim")


def peaks_table(peaks: Peaks) -> Table:
    """Peaks as a rich table: a rate and, for each dtype, the ridge of its roofline."""
    from rich.table import Table

    from module0_profiling.plots import short

    drawn = Table(title=peaks.fingerprint, title_justify="left")
    for column in ("peak", "measured", "ridge"):
        drawn.add_column(column, justify="left" if column == "peak" else "right")
    drawn.add_row(f"read bandwidth ({peaks.read_method})", f"{short(peaks.read_bandwidth)}B/s", "")
    drawn.add_row("copy bandwidth (read + write)", f"{short(peaks.copy_bandwidth)}B/s", "")
    for dtype, rate in peaks.matmul.items():
        drawn.add_row(f"{dtype} matmul", f"{short(rate)}FLOP/s", f"{peaks.roof(dtype).ridge:.3g} FLOP/byte")
    return drawn


def register(app: typer.Typer) -> None:
    """Add the commands of module 0 to `titan`."""
    from module0_profiling import kernel_commands, ncu_commands, predict_commands, trace_commands
    from module0_profiling.course import commands as course

    app.command()(doctor)
    app.command()(peaks)
    kernel_commands.register(app)
    ncu_commands.register(app)
    trace_commands.register(app)
    predict_commands.register(app)
    course.register(app)
