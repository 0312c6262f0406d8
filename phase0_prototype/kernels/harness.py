"""Checks and times a ladder: every version against float64, then all of them and the peer in one interleaved run.

Without a GPU it prints the static report instead, and says that nothing was timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from phase0_prototype.kernels import emulated, ladder, launch
from phase0_prototype.kernels.operation import Call, Operation, Tensors

RAGGED = (512, 257, 1000)  # square sizes for the check: a multiple of every tile, and two that are of none


@dataclass(frozen=True)
class Checked:
    """Largest error of one version relative to the largest value of the float64 result."""

    version: str
    size: int
    error: float


@dataclass(frozen=True)
class Timed:
    """One row of the bench: seconds (median), spread, and its speed over the first version and over the peer."""

    version: str
    seconds: float
    spread: float
    over_first: float
    over_peer: float
    gbytes_per_second: float
    tflops: float


def check(operation: Operation, sizes: tuple[int, ...] = RAGGED) -> list[Checked]:
    """Runs every version on a GPU and compares it with the torch twin in float64."""
    results = []
    for size in sizes:
        tensors = operation.inputs(size, "cuda")
        for version in ladder.read(operation.source):
            results.append(Checked(version.name, size, error_of(operation, version.name, tensors, "cuda")))
    return results


def error_of(operation: Operation, version: str, tensors: Tensors, device: str) -> float:
    """Largest error of a version (or of ``triton``) relative to the largest value of the float64 result."""
    exact = operation.reference(*(t.double() for t in tensors))
    if version == "triton":
        got = operation.triton(*tensors)
    else:
        call = operation.call(*tensors)
        call.out.fill_(float("nan"))  # memory that an earlier version wrote must not pass for a result
        preparer(device)(operation.source, version, call)()
        got = call.out
    return float((got.double() - exact).abs().max() / exact.abs().max())


def preparer(device: str) -> Callable[[Path, str, Call], Callable[[], None]]:
    """How a version is launched: on a GPU, or for "cpu" in the emulation."""
    return emulated.prepare if device == "cpu" else launch.prepare


def bench(operation: Operation, *, size: int | None = None, rounds: int = 7, device: str = "cuda") -> list[Timed]:
    """Times every version, the Triton twin and the peer, interleaved in one run on a GPU.

    ``device="cpu"`` runs the same lines in the emulation; the times then mean nothing.
    """
    from module0_profiling.timing import interleave, ratio

    tensors = operation.inputs(size or operation.bench_size, device)
    call = operation.call(*tensors)
    names = [version.name for version in ladder.read(operation.source)]
    functions = {name: preparer(device)(operation.source, name, call) for name in names}
    timings = interleave(
        {
            **functions,
            "triton": lambda: operation.triton(*tensors),
            operation.peer: lambda: operation.reference(*tensors),
        },
        rounds=rounds,
        device=device,
    )
    moved, flops = operation.work(*tensors)
    first, peer = timings[names[0]], timings[operation.peer]
    return [
        Timed(
            name,
            timing.median,
            timing.spread,
            ratio(first, timing),
            ratio(peer, timing),
            moved / timing.median / 1e9,
            flops / timing.median / 1e12,
        )
        for name, timing in timings.items()
    ]


def ncu_command(operation: Operation) -> str:
    """`ncu_of` for the module that times an operation of this phase."""
    return ncu_of(operation.source, f"-m phase0_prototype.kernels.{operation.source.stem}")


def ncu_of(source: Path, arguments: str) -> str:
    """The command that measures what only the hardware knows: achieved occupancy, sectors, bank conflicts.

    ``arguments`` are those of a Python that launches the kernels of ``source``.
    """
    metrics = (
        "sm__warps_active.avg.pct_of_peak_sustained_active",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
        "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    )
    kernels = "|".join(version.name for version in ladder.read(source))
    return f"ncu --kernel-name 'regex:{kernels}' --metrics {','.join(metrics)} {sys.executable} {arguments}"


def main(operation: Operation) -> None:
    """Entry of ``python -m phase0_prototype.kernels.<name>``."""
    from rich.console import Console

    console = Console()
    for version in ladder.read(operation.source):
        console.print(f"{version.name:22} adds: {version.adds}", markup=False, soft_wrap=True)
    if torch.cuda.is_available():
        _measure(operation, console)
    else:
        _report(operation, console)
    console.print(f"\nAchieved occupancy and memory counters:\n{ncu_command(operation)}", markup=False, soft_wrap=True)


def _measure(operation: Operation, console: object) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    errors: dict[str, float] = {}
    for checked in check(operation):
        errors[checked.version] = max(errors.get(checked.version, 0.0), checked.error)
    table = Table(title=f"{operation.name}, size {operation.bench_size}, {torch.cuda.get_device_name()}")
    for column in ("version", "ms", "spread", "x first", "x peer", "GB/s", "TFLOP/s", "max error"):
        table.add_column(column, justify="left" if column == "version" else "right", no_wrap=True)
    for row in bench(operation):
        numbers = (row.over_first, row.over_peer, row.gbytes_per_second, row.tflops)
        error = f"{errors[row.version]:.1e}" if row.version in errors else ""
        table.add_row(
            row.version, f"{row.seconds * 1e3:.3f}", f"{row.spread:.0%}", *(f"{x:.2f}" for x in numbers), error
        )
    console.print(table)


def _report(operation: Operation, console: object) -> None:
    from rich.console import Console

    from module0_profiling.gpu_tools import CompileError, MissingTool
    from module0_profiling.kernel_commands import LEGEND, table_of
    from module0_profiling.static_report import report_cuda

    assert isinstance(console, Console)
    console.print("\nNo NVIDIA GPU here: correctness on a GPU and speed are NOT MEASURED HERE. Static report:\n")
    try:
        console.print(table_of(operation.source.name, report_cuda(operation.source)))
        console.print(LEGEND, style="dim")
    except (MissingTool, CompileError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
