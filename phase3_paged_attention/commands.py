"""The `titan` commands of phase 3: `doctor`, which knows the attention backends now, and `calibrate-kv`."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer


def doctor(
    model: Annotated[str, typer.Option(help="Whose attention is asked about.")] = "titan-tiny",
    kv_cache_dtype: Annotated[str, typer.Option(help="With a cache of these numbers.")] = "auto",
) -> None:
    """What this machine has, what is missing, and which attention backends can run a model here."""
    from rich.console import Console
    from rich.table import Table

    from module0_profiling import doctor as tools

    console = Console()
    console.print(tools.table(tools.examine()))
    drawn = Table(title=f"attention backends for {model}", title_justify="left")
    drawn.add_column("backend", no_wrap=True)
    drawn.add_column("why, or why not", overflow="fold")
    try:
        from phase0_prototype.engines import rooms_with_an_engine

        newest = importlib.import_module(f"{rooms_with_an_engine()[-1]}.engine")
        for name, said in newest.explain(model, kv_cache_dtype):
            drawn.add_row(name, said, style="green" if said.startswith("chosen") else "")
    except ImportError as error:  # a machine without torch: the table above says so
        drawn.add_row("", f"can't be asked: {error}")
    console.print(drawn)


def calibrate_kv(
    model: Annotated[str, typer.Argument(help="Directory, shipped name or hub id.")] = "titan-tiny",
    kv_cache_dtype: Annotated[str, typer.Option(help="fp8_e4m3 or fp8_e5m2.")] = "fp8_e4m3",
    tokens: Annotated[int, typer.Option(help="Tokens of text to look at.")] = 8192,
    out: Annotated[str, typer.Option(help="File to write; by default beside the checkpoint.")] = "",
) -> None:
    """Find the scales of an FP8 cache: the largest key and value of each layer on real text."""
    from phase3_paged_attention.calibrate import calibrate

    typer.echo(calibrate(model, kv_cache_dtype, tokens, out))


def register(app: typer.Typer) -> None:
    """Add the commands to `titan`."""
    app.command()(doctor)
    app.command()(calibrate_kv)
