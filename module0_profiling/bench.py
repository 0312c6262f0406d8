"""What every room's `benchmark.py` shares: cases by name, one command line, figures with their spread.

A case is a function of `Options` that times its subjects in turns and returns `Figure`s; `main` runs the cases named on
the command line and records each as reports/results/<phase>/<case>.json (with `_gpu` behind the name on a GPU).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from module0_profiling import rooms
from module0_profiling.bench_gpu import CheckFailed, dry_run
from module0_profiling.results import Figure, record


@dataclass(frozen=True)
class Options:
    """What the command line fixed for all cases.

    Attributes:
        device: as torch names it.
        rounds: how often each subject is timed.
        checkpoint: directory of the large random checkpoint; a dry run has a tiny one here.
        console: for progress.
        dry: tiny sizes on the CPU; nothing is recorded.
    """

    device: str
    rounds: int
    checkpoint: Path
    console: Console
    dry: bool = False

    def size(self, full: int, tiny: int) -> int:
        """A size: the one that is measured, or that of a dry run."""
        return tiny if self.dry else full


Case = Callable[[Options], tuple[Figure, ...]]


@dataclass(frozen=True)
class Suite:
    """The cases of a room.

    Attributes:
        room: its package.
        cases: by name, in the order in which they run.
        needs_gpu: those that measure nothing on a CPU.
        gpu: those that `make bench-gpu` runs; a dry run goes through them.
        peers: for each case the packages whose versions belong to its result.
        checkpoint: the default of `--checkpoint`.
        tiny: gives the tiny checkpoint of a dry run.
    """

    room: str
    cases: Mapping[str, Case]
    needs_gpu: Sequence[str]
    gpu: Sequence[str]
    peers: Mapping[str, Sequence[str]]
    checkpoint: Path
    tiny: Callable[[], Path]


def spread(values: Sequence[float]) -> float:
    """(max - min) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def figure(name: str, values: Sequence[float], unit: str, note: str = "") -> Figure:
    """Median and spread of a series."""
    return Figure(name, statistics.median(values), unit, spread(values), note)


def ratio(name: str, slow: Sequence[float], fast: Sequence[float], note: str = "") -> Figure:
    """How many times faster `fast` is, round by round."""
    return figure(name, [s / f for s, f in zip(slow, fast, strict=True)], "x", note)


def main(suite: Suite, doc: str | None) -> None:
    """Run the cases named on the command line, or all."""
    import torch

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(suite.cases)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, default=suite.checkpoint, help="of the large random model")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, records nothing")
    args = parser.parse_args()
    unknown = [c for c in args.cases if c not in suite.cases]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}: choose {', '.join(suite.cases)}")
    if args.dry_run:
        sys.exit(_dry_run(suite, args.cases))
    on_gpu = args.device.startswith("cuda")
    if not on_gpu and (needs := [c for c in args.cases if c in suite.needs_gpu]):
        parser.error(f"{needs[0]} needs a GPU: nothing was measured")
    console = Console()
    options = Options(args.device, args.rounds, args.checkpoint, console)
    for name in args.cases or [c for c in suite.cases if on_gpu or c not in suite.needs_gpu]:
        console.rule(name)
        try:
            figures = suite.cases[name](options)
        except CheckFailed as error:
            sys.exit(f"{name} failed: {error}")
        for f in figures:
            console.print(f"  {f.name:45} {f.value:12.4g} {f.unit:10} spread {(f.spread or 0):.0%}", highlight=False)
        if not args.no_record:
            record(
                rooms.phase(suite.room),
                name + ("_gpu" if on_gpu else ""),
                figures,
                command=f"python -m {suite.room}.benchmark {name} --device {args.device} --rounds {args.rounds}",
                peers=tuple(suite.peers.get(name, ())),
                device="gpu" if on_gpu else "cpu",
            )


def _dry_run(suite: Suite, names: Sequence[str]) -> int:
    """Every GPU case, or those named, with tiny sizes on the CPU; 1 if one failed."""
    import torch

    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, which no case has done yet
    torch.set_num_threads(1)
    options = Options("cpu", rounds=1, checkpoint=suite.tiny(), console=Console(quiet=True), dry=True)
    return dry_run({name: partial(suite.cases[name], options) for name in names or suite.gpu})
