"""`titan simulate`: policies beside each other on one trace; `titan memory-map`: what every block holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from phase1_memory.memory_map import MemorySnapshot
    from phase1_memory.simulator import Setup, Summary
    from phase1_memory.traces import Trace

T = TypeVar("T")
TRACES = ("sharegpt", "alpaca", "growing", "uniform", "bimodal", "checkerboard")
NOTES = """Batch, and shares of the memory: means over the steps. Fragmentation: the unused
share of what was given out. Pieces: runs of blocks that a request consists of.
us/step: the policy's own work, median. Recomputed and copied are tokens."""
MOST_TOKENS = 100_000_000  # of a simulated memory; beyond it the lists of blocks themselves fill a machine
MOST_REQUESTS = 1_000_000


def simulate(
    policy: Annotated[
        str, typer.Option(help="max, pow2, oracle, runs, pages, vllm; several with commas; or all.")
    ] = "all",
    trace: Annotated[
        str, typer.Option(help=f"{', '.join(TRACES)}, or a CSV file: arrival, prompt, output.")
    ] = "sharegpt",
    memory: Annotated[int, typer.Option(help="Tokens that the KV memory holds.")] = 15_700,
    page: Annotated[int, typer.Option(help="Tokens in a block.")] = 16,
    out_of_memory: Annotated[
        str, typer.Option(help="What the youngest suffers: recompute, swap, reject.")
    ] = "recompute",
    requests: Annotated[int, typer.Option(help="Of a generated trace; of `growing`: alive at once.")] = 500,
    rate: Annotated[float, typer.Option(help="Arrivals a step.")] = 1.0,
    steps: Annotated[int, typer.Option(help="At most.")] = 2000,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run together at most.")] = 4096,
    max_model_len: Annotated[int, typer.Option(help="Longest request, prompt included.")] = 2048,
    plot: Annotated[Path | None, typer.Option(help="Folder and stem of plots, as in out/run.")] = None,
    seed: Annotated[int, typer.Option(help="Of the generated trace.")] = 0,
) -> None:
    """Replay a workload against several ways to manage KV memory: batch, waste, preemptions, allocator time."""
    from rich.console import Console

    from phase1_memory.policies import NAMES, Memory, make_policy
    from phase1_memory.simulator import simulate as run

    names = list(NAMES) if policy == "all" else [_choice("--policy", name.strip(), NAMES) for name in policy.split(",")]
    jobs = _trace(trace, seed, requests, rate, steps)
    setup = _setup(out_of_memory, steps, max_num_seqs, max_model_len)
    where = Memory(_memory(memory, page), page, max_model_len=max_model_len)
    console = Console()
    found = {}
    for name in dict.fromkeys(names):
        with console.status(f"simulating {name}"):
            found[name] = run(jobs, make_policy(name, where), setup)
    console.print(
        f"{jobs.name}: {len(jobs.jobs)} requests, {memory} tokens of memory, pages of {page}, {out_of_memory}",
        highlight=False,
        markup=False,
    )
    for table in tables([simulation.summary for simulation in found.values()]):
        console.print(table)
        console.print()
    console.print(NOTES, highlight=False)
    if plot:
        from phase1_memory.simulator_cases import draw

        drawn = _written(plot, lambda: draw(found, plot)) if all(s.moments for s in found.values()) else []
        for path in drawn:
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def memory_map(
    prompt: Annotated[list[str] | None, typer.Argument(help="Run these on an engine; without: simulate.")] = None,
    model: Annotated[str, typer.Option(help="For prompts: directory, shipped name or hub id.")] = "titan-tiny",
    n: Annotated[int, typer.Option(help="For prompts: sequences of each, which share its blocks.")] = 1,
    tokens: Annotated[int, typer.Option(help="For prompts: tokens that each has generated.")] = 32,
    trace: Annotated[str, typer.Option(help="As in `titan simulate`.")] = "sharegpt",
    step: Annotated[int, typer.Option(help="Of the simulation.")] = 500,
    policy: Annotated[str, typer.Option(help="max, pow2, oracle, runs, pages or vllm.")] = "pages",
    memory: Annotated[int, typer.Option(help="Tokens that the simulated memory holds.")] = 15_700,
    page: Annotated[int, typer.Option(help="Tokens in a simulated block.")] = 16,
    requests: Annotated[int, typer.Option(help="Of a generated trace; of `growing`: alive at once.")] = 500,
    rate: Annotated[float, typer.Option(help="Arrivals a step.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the generated trace.")] = 0,
    image: Annotated[Path | None, typer.Option(help="Draw it as SVG and PNG, too.")] = None,
    no_colour: Annotated[bool, typer.Option("--no-colour", help="Letters only.")] = False,
) -> None:
    """Draw the KV memory, a character a block: whose it is, what is shared, how full it is, where the holes are."""
    from rich.console import Console

    from phase1_memory import memory_map as drawing

    console = Console(highlight=False)
    if prompt:
        _least("--n", n, 1)
        _least("--tokens", tokens, 1)
        snapshot, title = live_snapshot(prompt, model, n, tokens), f"{model}, {len(prompt)} prompts x {n}"
    else:
        _least("--step", step, 0)
        snapshot = _simulated(policy, _trace(trace, seed, requests, rate, step + 1), step, memory, page)
        title = f"{trace} in {policy}, step {step}"
    coloured = not no_colour and console.color_system is not None and not console.no_color
    console.print(title, markup=False)
    console.print(drawing.terminal_map(snapshot, console.width, colour=coloured), end="")
    if image:
        for path in _written(image, lambda: drawing.image_map(snapshot, image)):
            console.print(str(path), markup=False, soft_wrap=True)


def live_snapshot(prompts: list[str], model: str, n: int, tokens: int) -> MemorySnapshot:
    """The memory of an engine after `n` sequences of each prompt have generated `tokens` tokens."""
    from phase1_memory.live_map import snapshot_of  # type: ignore[import-not-found]

    found: MemorySnapshot = snapshot_of(prompts, model, n, tokens)
    return found


def tables(rows: list[Summary]) -> list[Table]:
    """Batches and the time that the policy took; kinds of memory; what running out of it cost."""
    batches = _table(("policy", "steps", "finished", "batch", "largest", "tokens/step", "us/step", "p99 us"))
    kinds = _table(("policy", "stored", "reserved", "internal", "external", "fragmentation", "pieces"))
    prices = _table(("policy", "rejected", "preempted", "recomputed", "swapped", "copied"))
    for done in rows:
        rate, times = done.tokens / max(1, done.steps), (done.median_seconds, done.p99_seconds)
        ends = (str(done.steps), str(done.finished), f"{done.mean_batch:.1f}", str(done.largest_batch), f"{rate:.1f}")
        batches.add_row(done.policy, *ends, *(f"{seconds * 1e6:.0f}" for seconds in times))
        shares = (done.stored, done.reserved, done.internal, done.external, done.fragmentation)
        kinds.add_row(done.policy, *(f"{100 * share:.1f} %" for share in shares), f"{done.pieces:.1f}")
        moved = (_short(done.recomputed_tokens), f"{_short(done.swapped_bytes)}B", _short(done.copied_tokens))
        prices.add_row(done.policy, str(done.rejected), str(done.preemptions), *moved)
    return [batches, kinds, prices]


def _simulated(policy: str, trace: Trace, step: int, memory: int, page: int) -> MemorySnapshot:
    from phase1_memory.policies import NAMES, Memory, make_policy
    from phase1_memory.simulator import Setup, snapshot_at

    name, tokens = _choice("--policy", policy, NAMES), _memory(memory, page)
    made = make_policy(name, Memory(tokens, page, grain=page))
    return snapshot_at(trace, made, Setup(), step)


def _trace(name: str, seed: int, requests: int, rate: float, steps: int) -> Trace:
    from phase0_prototype.errors import UserError
    from phase1_memory import traces

    _least("--seed", seed, 0)
    _least("--requests", requests, 1)
    if requests > MOST_REQUESTS:
        raise UserError(f"--requests {requests}: at most {MOST_REQUESTS} are simulated")
    if not 0 < rate <= 1e9:
        raise UserError(f"--rate {rate:g}: give a positive number of arrivals a step")
    if name in traces.MEANS:
        return traces.conversations(name, seed, requests, rate)
    made: dict[str, Callable[[], Trace]] = {
        "growing": lambda: traces.growing(seed, requests, steps),
        "uniform": lambda: traces.uniform(seed, requests, rate),
        "bimodal": lambda: traces.bimodal(seed, requests, rate),
        "checkerboard": lambda: traces.checkerboard(max(1, requests // 2)),
    }
    if name in made:
        return made[name]()
    if not name.endswith(".csv") and not Path(name).exists():
        raise UserError(f"--trace {name!r}: choose one of {', '.join(TRACES)}, or give a CSV file")
    return traces.read_csv(Path(name))


def _setup(pressure: str, steps: int, max_num_seqs: int, max_model_len: int) -> Setup:
    from phase1_memory.simulator import PRESSURES, Setup

    _least("--steps", steps, 1)
    _least("--max-num-seqs", max_num_seqs, 1)
    _least("--max-model-len", max_model_len, 2)
    return Setup(_choice("--out-of-memory", pressure, PRESSURES), max_num_seqs, max_model_len, steps)


def _memory(tokens: int, page: int) -> int:
    from phase0_prototype.errors import UserError

    _least("--page", page, 1)
    if not page <= tokens <= MOST_TOKENS:
        raise UserError(f"--memory {tokens}: give at least one page of {page} tokens, and at most {MOST_TOKENS}")
    return tokens


def _least(option: str, value: int, least: int) -> None:
    from phase0_prototype.errors import UserError

    if value < least:
        raise UserError(f"{option} {value}: give at least {least}")


def _choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    from phase0_prototype.errors import UserError

    if value not in choices:
        raise UserError(f"{option} {value!r}: choose one of {', '.join(choices)}")
    return value


def _written(path: Path, draw: Callable[[], T]) -> T:
    """What `draw` returns; a place that cannot be written to, or no matplotlib, is one line."""
    from phase0_prototype.errors import UserError

    try:
        return draw()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; choose another place for the picture") from None
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("pictures need matplotlib: pip install matplotlib") from None


def _table(heads: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in heads:
        drawn.add_column(head, justify="left" if head == "policy" else "right", overflow="fold")
    return drawn


def _short(value: float) -> str:
    from module0_profiling.plots import short

    return short(value) if value >= 1000 else f"{value:.0f} "


def register(app: typer.Typer) -> None:
    """Add the commands to `titan`."""
    app.command()(simulate)
    app.command("memory-map")(memory_map)
