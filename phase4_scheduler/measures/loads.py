"""Loads that several servers are given in turns, and the figures that come of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.results import Figure
from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.client import Target
from phase4_scheduler.bench.load import run_load
from phase4_scheduler.bench.summary import Summary, summarise
from phase4_scheduler.bench.workloads import PromptMaker, Workload
from phase4_scheduler.measures.servers import Launch, Server

BUSY_CLIENT = 0.5  # share of a core above which the client takes a part in what is measured


@dataclass(frozen=True)
class Load:
    """One row of a comparison.

    Attributes:
        name: of the row.
        workload: makes the requests of a round from its seed.
        concurrency: requests in flight.
    """

    name: str
    workload: Callable[[PromptMaker], Workload]
    concurrency: int


def send(url: str, load: Load, seed: int) -> Summary:
    """Give a server one load.

    Raises:
        CheckFailed: an answer failed, or was shorter than asked for: its rate would be worth nothing.
    """
    workload = load.workload(PromptMaker(seed))
    done = summarise(asyncio.run(run_load(Target(url), workload, Arrival.closed_loop(load.concurrency))))
    if done.failed or done.short_answers:
        raise CheckFailed(f"{load.name}: {done.failed} failed, {done.short_answers} too short: {done.errors}")
    return done


def compare(servers: Sequence[Launch], loads: Sequence[Load], options: Options) -> tuple[Figure, ...]:
    """Start all servers, give each of them each load once to warm up, then `rounds` times in turns.

    Whoever is not measured is halted. All get the same prompts in a round, and other ones in the next.
    """
    with ExitStack() as stack:
        running: dict[str, Server] = {}
        started: list[Figure] = []
        for launch in servers:  # one after the other: a start is measured, too
            with options.console.status(f"starting {launch.name}"):
                server = stack.enter_context(Server(launch))
                seconds = server.wait_until_ready()
            server.halt()
            running[launch.name] = server
            started.append(Figure(f"start/{launch.name}", seconds, "s", note=str(launch)))
        found: dict[str, dict[str, list[Summary]]] = {load.name: {name: [] for name in running} for load in loads}
        for round_ in range(options.rounds + 1):
            for load in loads:
                for name in list(running) if round_ % 2 else reversed(list(running)):
                    label = f"{load.name}: {name}, " + (f"round {round_}" if round_ else "warming up")
                    with options.console.status(label):
                        done = _turn(running[name], load, seed=round_)
                    if round_:
                        found[load.name][name].append(done)
        return (*started, *(f for row, runs in found.items() for f in figures_of(row, runs)))


def _turn(server: Server, load: Load, seed: int) -> Summary:
    server.resume()
    try:
        return send(server.url, load, seed)
    finally:
        server.halt()


def figures_of(row: str, runs: Mapping[str, Sequence[Summary]]) -> list[Figure]:
    """Rates and latencies of each server, and how many times faster the first is than each other one."""
    figures = []
    for name, done in runs.items():
        busiest = max(d.client_busy for d in done)
        note = f"the client used {busiest:.0%} of a core" if busiest > BUSY_CLIENT else ""
        figures.append(figure(f"{row}/{name}", [d.output_rate for d in done], "tokens/s", note))
        for title, times in (("first token", [d.ttft for d in done]), ("a token more", [d.itl for d in done])):
            if all(times):
                figures.append(figure(f"{row}/{name}, {title}", [1e3 * t.p50 for t in times if t], "ms"))
                figures.append(figure(f"{row}/{name}, {title}, p99", [1e3 * t.p99 for t in times if t], "ms"))
    first, *others = runs
    for other in others:
        ours, theirs = ([d.output_rate for d in runs[name]] for name in (first, other))
        figures.append(ratio(f"{row}/over {other}", ours, theirs))
    return figures
