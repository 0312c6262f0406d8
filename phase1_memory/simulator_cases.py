"""What the simulator says, as gates, benchmark figures and plots: the same memory under all policies.

The memory is that of the PagedAttention paper's first server: OPT-13B on an A100 of 40 GB leaves room for 15.7 thousand
tokens (table 1). Figure 13 of the paper has 7.00, 9.81, 13.62 and 30.42 requests in a batch there for Orca (Max), Orca
(Pow2), Orca (Oracle) and vLLM on ShareGPT: what a simulation should come near to, though the paper's server was
not always full, and its lengths are the data set's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from module0_profiling import plots
from module0_profiling.results import Figure
from phase1_memory import traces
from phase1_memory.policies import NAMES, Memory, make_policy
from phase1_memory.simulator import PRESSURES, Setup, Simulation, Summary, simulate

SERVER = Memory(tokens=15_700)
ROOMY = Memory(tokens=800_000)  # 1000 growing requests hold about 500 000 tokens
KINDS = ("stored", "reserved", "internal", "external", "free")
POINTS = 300  # that a curve is drawn with
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
Key = tuple[str, str]  # trace, policy


@dataclass(frozen=True)
class Sizes:
    """How much is simulated: requests of the traces, how many of `growing` are alive at once, steps."""

    requests: int = 800
    alive: int = 1024
    steps: int = 1500


FULL = Sizes()
DRY = Sizes(requests=30, alive=20, steps=40)


def fragmentation(sizes: Sizes = FULL) -> float:
    """Share of the pages given to more than 1000 growing requests that holds no token."""
    return growing(("pages",), sizes)["pages"].summary.fragmentation


def batch_over_contiguous(sizes: Sizes = FULL) -> float:
    """How many times more requests run in pages than in rows of max_model_len: the lesser of mean and largest batch."""
    found = sharegpt(("pages", "max"), sizes)
    paged, rows = found["pages"].summary, found["max"].summary
    return min(paged.mean_batch / rows.mean_batch, paged.largest_batch / rows.largest_batch)


def growing(policies: Sequence[str] = NAMES, sizes: Sizes = FULL) -> dict[str, Simulation]:
    """More than a thousand requests that grow by a token a step, in a memory where they fit in pages."""
    trace = traces.growing(0, sizes.alive, sizes.steps)
    return _compare(trace, ROOMY, policies, Setup(max_steps=sizes.steps))


def sharegpt(policies: Sequence[str] = NAMES, sizes: Sizes = FULL) -> dict[str, Simulation]:
    """More conversations than the paper's server can take: somebody always waits."""
    trace = traces.conversations("sharegpt", 0, sizes.requests, rate=1.0)
    return _compare(trace, SERVER, policies, Setup(max_steps=sizes.steps))


def adversarial(policies: Sequence[str] = NAMES, sizes: Sizes = FULL) -> dict[Key, Simulation]:
    """Traces that leave holes which contiguous memory cannot use; the checkerboard's memory is just full at first."""
    setup, memory = Setup(max_steps=sizes.steps), Memory(SERVER.tokens, max_model_len=2 * traces.CAP)
    board = traces.checkerboard(pairs=64)
    found: dict[Key, Simulation] = {}
    for trace, where in (
        (traces.bimodal(0, sizes.requests, 1.0), memory),
        (traces.uniform(0, sizes.requests, 1.0), memory),
        (board, Memory(2 * 64 * 64, max_model_len=128)),
    ):
        for name, simulation in _compare(trace, where, policies, setup).items():
            found[trace.name, name] = simulation
    return found


def simulator(console: Console, sizes: Sizes = FULL) -> tuple[Figure, ...]:
    """Every policy on every trace: batch, kinds of waste, allocator time."""
    found: dict[Key, Simulation] = {}
    parts: tuple[tuple[str, Callable[[], Mapping[Any, Simulation]]], ...] = (
        ("growing", lambda: growing(sizes=sizes)),
        ("sharegpt", lambda: sharegpt(sizes=sizes)),
        ("adversarial traces", lambda: adversarial(sizes=sizes)),
    )
    for title, part in parts:
        with console.status(f"simulating {title}"):
            found |= {(s.summary.trace, s.summary.policy): s for s in part().values()}
    figures = [figure for simulation in found.values() for figure in _figures(simulation.summary)]
    paged, rows = (found["sharegpt", name].summary for name in ("pages", "max"))
    figures.append(Figure("sharegpt/batch over contiguous", paged.mean_batch / max(1e-9, rows.mean_batch), "x"))
    return tuple(figures)


def pressure(console: Console, sizes: Sizes = FULL) -> tuple[Figure, ...]:
    """What happens in pages when memory runs out: recompute, swap, or end the youngest."""
    trace = traces.conversations("sharegpt", 0, sizes.requests, rate=1.0)
    figures: list[Figure] = []
    for name in PRESSURES:
        with console.status(f"simulating {name}"):
            done = simulate(trace, make_policy("pages", SERVER), Setup(name, max_steps=sizes.steps)).summary
        figures.append(Figure(f"{name}/tokens a step", done.tokens / max(1, done.steps), "tokens"))
        figures.append(Figure(f"{name}/preemptions", done.preemptions, ""))
        figures.append(Figure(f"{name}/rejected", done.rejected, ""))
        figures.append(Figure(f"{name}/recomputed", done.recomputed_tokens, "tokens"))
        figures.append(Figure(f"{name}/swapped", done.swapped_bytes / 1e9, "GB"))
    return tuple(figures)


def draw(found: Mapping[str, Simulation], path: Path) -> list[Path]:
    """Plots beside `path`: <stem>-memory, <stem>-batch and <stem>-waste, each as SVG and PNG.

    Args:
        found: policy -> simulation, all of one trace and one memory.
        path: folder and stem.
    """
    digest = plots.digest_of({name: [moment[:-1] for moment in s.moments] for name, s in found.items()})
    shares = {
        kind: {name: 100 * getattr(s.summary, kind) for name, s in found.items()}
        for kind in ("stored", "reserved", "internal", "external")
    }
    title = f"{next(iter(found.values())).summary.trace}: what the memory holds"
    return [
        *plots.save(_memory(found, title), path.with_name(f"{path.stem}-memory"), digest),
        *plots.save(_batches(found), path.with_name(f"{path.stem}-batch"), digest),
        *plots.bar_plot(shares, "% of the memory", path.with_name(f"{path.stem}-waste"), title=title, digest=digest),
    ]


def _compare(trace: traces.Trace, memory: Memory, names: Sequence[str], setup: Setup) -> dict[str, Simulation]:
    return {name: simulate(trace, make_policy(name, memory), setup) for name in names}


def _figures(done: Summary) -> list[Figure]:
    row = f"{done.trace}, {done.policy}"
    shares = {kind: getattr(done, kind) for kind in ("stored", "reserved", "internal", "external", "fragmentation")}
    return [
        Figure(f"{row}/mean batch", done.mean_batch, "requests"),
        Figure(f"{row}/largest batch", done.largest_batch, "requests"),
        *(Figure(f"{row}/{kind}", 100 * share, "%") for kind, share in shares.items()),
        Figure(f"{row}/preemptions", done.preemptions, ""),
        Figure(f"{row}/pieces a request", done.pieces, ""),
        Figure(f"{row}/copied", done.copied_tokens, "tokens"),
        Figure(f"{row}/allocator, median", done.median_seconds * 1e6, "us"),
        Figure(f"{row}/allocator, p99", done.p99_seconds * 1e6, "us"),
    ]


def _memory(found: Mapping[str, Simulation], title: str) -> Any:
    """One panel a policy, the kinds stacked over time."""
    drawing, panels = _panels(len(found))
    for panel, (name, simulation) in zip(panels, found.items(), strict=False):
        steps, kinds = _curve(simulation, "step"), [_curve(simulation, kind) for kind in KINDS]
        total = sum(kinds)
        layers = panel.stackplot(
            steps,
            [100 * kind / total for kind in kinds],
            colors=[*plots.COLOURS[:4], "white"],
            labels=KINDS,
            edgecolor="black",
            linewidth=0.3,
        )
        for layer, hatch in zip(layers, plots.HATCHES, strict=False):
            layer.set_hatch(hatch if layer is not layers[-1] else "")
        panel.set_title(name, fontsize=9)
        panel.set(ylim=(0, 100), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
    drawing.suptitle(title, fontsize=10)
    drawing.supxlabel("step", fontsize=9)
    drawing.supylabel("% of the memory", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right upper", fontsize=8)
    return drawing


def _batches(found: Mapping[str, Simulation]) -> Any:
    """The running requests of every policy over time."""
    drawing, (axes, *_) = _panels(1)
    for index, (name, simulation) in enumerate(found.items()):
        style = LINES[index % len(LINES)]
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        steps, running = _curve(simulation, "step"), _curve(simulation, "running")
        width = max(1.0, 3.5 - 0.5 * index)  # where two curves are one, both are seen
        axes.plot(steps, running, linestyle=style, linewidth=width, color=colour, label=name)
    axes.set(xlabel="step", ylabel="requests that run", title=next(iter(found.values())).summary.trace)
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)
    drawing.legend(loc="outside right upper", fontsize=8)
    return drawing


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    columns = min(3, count)
    rows = -(-count // columns)
    drawing = Drawing(
        figsize=(8.5 if columns > 1 else 7.5, 1.2 + (2.2 if columns > 1 else 3.0) * rows), layout="constrained"
    )
    FigureCanvasAgg(drawing)
    grid = drawing.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for panel in grid[count:]:
        panel.set_visible(False)
    return drawing, grid[:count]


def _curve(simulation: Simulation, column: str) -> np.ndarray:
    """A column of the moments, float64, thinned to at most POINTS by the mean of neighbours."""
    values = np.array([getattr(moment, column) for moment in simulation.moments], np.float64)
    return np.array([part.mean() for part in np.array_split(values, min(POINTS, len(values)))])
