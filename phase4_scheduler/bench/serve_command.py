"""What `titan bench serve` does: run the load with a bar, keep what there is on Ctrl-C, show, write, draw."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from phase4_scheduler.bench import plots, result_file, tables
from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.client import Target
from phase4_scheduler.bench.load import run_load
from phase4_scheduler.bench.samples import LoadResult, Sample
from phase4_scheduler.bench.summary import Slo, summarise
from phase4_scheduler.bench.workloads import Workload

INTERRUPTED_STATUS = 130  # of a command that was ended by Ctrl-C


def run(
    target: Target,
    workload: Workload,
    arrival: Arrival,
    warmup: Workload | None,
    seed: int,
    slo: Slo,
    out: Path | None,
    plot: Path | None,
) -> int:
    """Run a load and report it; returns the exit status: 0, 1 when nothing was answered, 130 after Ctrl-C.

    Raises:
        UserError: see `run_load`.
    """
    console = Console(highlight=False)
    result = asyncio.run(_with_bar(target, workload, arrival, warmup, seed))
    summary = summarise(result, slo)
    config = result.config
    console.print(f"{config['server']}{target.endpoint}, {config['model']}", markup=False)
    console.print(f"{config['workload']}; {config['requests']} requests, {config['arrival']}", markup=False)
    for table in tables.of_load(summary):
        console.print()
        console.print(table)
    for remark in tables.remarks(summary):
        console.print(remark, style="yellow", markup=False)
    if out:
        parts = {"config": config, "summary": summary.plain(), "requests": result.columns()}
        console.print(str(result_file.write(out, "serve", parts, result.began)), markup=False, soft_wrap=True)
    if plot and summary.completed:
        for path in plots.draw(result, plot):
            console.print(str(path), markup=False, soft_wrap=True)
    if summary.interrupted:
        return INTERRUPTED_STATUS
    return 0 if summary.completed else 1


async def _with_bar(
    target: Target, workload: Workload, arrival: Arrival, warmup: Workload | None, seed: int
) -> LoadResult:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C ends at once
        stop.set()

    with contextlib.suppress(NotImplementedError):  # no signals in this loop: Ctrl-C then ends without figures
        loop.add_signal_handler(signal.SIGINT, interrupt)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=4,  # drawing costs the core that receives
    ) as bar:
        task = bar.add_task("requests", total=len(workload.items), tokens=0, failed=0)
        tokens = failed = 0

        def observe(sample: Sample) -> None:
            nonlocal tokens, failed
            tokens += sample.output_tokens
            failed += sample.error is not None
            bar.update(task, advance=1, tokens=tokens, failed=failed)

        return await run_load(target, workload, arrival, warmup=warmup, seed=seed, observe=observe, stop=stop)
