"""``titan kernels``: the static report of every kernel of every room."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from module0_profiling.static_report import KernelReport


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command("kernels")(kernels)


def kernels(
    room: Annotated[str, typer.Option(help="Only rooms whose name contains this, such as phase0.")] = "",
    arch: Annotated[str, typer.Option(help="GPU architectures, comma separated, or all.")] = "sm_80,sm_90,sm_120",
    threads: Annotated[int, typer.Option(help="Block size of kernels that do not declare one.")] = 0,
    mix: Annotated[bool, typer.Option("--mix", help="The instructions in full instead of the resources.")] = False,
) -> None:
    """Registers, spills, shared memory, occupancy and instructions of every kernel. Needs no GPU."""
    from rich.console import Console

    from module0_profiling.gpu_tools import CompileError, MissingTool

    console = Console()
    archs = archs_of(arch)
    failures, shown = 0, False
    for name in (n for n in rooms_with_kernels() if room in n):
        reports: list[KernelReport] = []
        for source in kernel_sources(name):
            try:
                reports += report_file(name, source, archs, threads or None)
            except (MissingTool, CompileError, ValueError) as error:
                console.print(f"{name}/kernels/{source.name}: {error}", markup=False, soft_wrap=True)
                failures += 1
        if reports:
            console.print(mix_table(name, reports) if mix else table_of(name, reports))
            shown = True
    if shown:
        console.print(MIX_LEGEND if mix else LEGEND, style="dim")
    if failures:
        raise typer.Exit(1)


def archs_of(text: str) -> tuple[str, ...]:
    """``sm_80,sm_90`` as a tuple; ``all`` is every architecture that the course reports."""
    from module0_profiling.static_report import ALL_ARCHS

    names = tuple(part.strip() for part in text.split(",") if part.strip())
    return ALL_ARCHS if names == ("all",) else names


def rooms_with_kernels() -> list[str]:
    """Rooms (top-level packages beside this one) that have a ``kernels`` folder, in the order of the course."""
    root = Path(__file__).parent.parent
    return sorted(p.parent.name for p in root.glob("[mp]*[0-9]_*/kernels") if p.is_dir())


def kernel_sources(room: str) -> list[Path]:
    """The ``.cu`` files of a room and those of its Python files that declare ``AOT`` builds."""
    folder = Path(__file__).parent.parent / room / "kernels"
    triton = [p for p in sorted(folder.glob("*.py")) if "\nAOT" in p.read_text()]
    return sorted(folder.glob("*.cu")) + triton


def report_file(room: str, source: Path, archs: tuple[str, ...], threads: int | None) -> list[KernelReport]:
    """Reports of one file of ``kernel_sources``; raises ``MissingTool`` or ``CompileError``."""
    from importlib import import_module

    from module0_profiling.gpu_tools import MissingTool
    from module0_profiling.static_report import report_cuda, report_triton

    if source.suffix == ".cu":
        return report_cuda(source, archs, threads=threads)
    try:
        module = import_module(f"{room}.kernels.{source.stem}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingTool("triton", "the Triton kernels are compiled with it") from error
    return report_triton(module.AOT, archs, source=source.name)


LIMITERS = {"block slots": "blks", "warp slots": "warp", "registers": "regs", "shared memory": "smem"}
LEGEND = (
    "sm: architecture; thr: threads of a block; reg: registers of a thread; spill,\n"
    "smem: bytes; occ: theoretical occupancy and by what it is limited (blocks,\n"
    "warps, registers, shared memory). Then instructions in the code, a loop body\n"
    "once: loads from global memory (LDG), loads of 128 bits among them and copies,\n"
    "loads from shared memory (LDS), float32 multiply-adds, tensor core (MMA)."
)


def table_of(title: str, reports: list[KernelReport]) -> Table:
    """The reports as a table of at most 80 columns; a spill is red because it is nearly always a mistake."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("kernel", no_wrap=True)
    for column in ("sm", "thr", "reg", "spill", "smem", "occ"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for column in ("LDG", "128", "LDS", "FFMA", "MMA"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = ""
    for r in reports:
        spill = f"[red]{r.spill_bytes}[/red]" if r.spill_bytes else "0"
        table.add_row(
            r.kernel if r.kernel != previous else "",
            *(r.arch.removeprefix("sm_"), str(r.threads), str(r.registers), spill, str(r.shared_bytes)),
            *(f"{r.occupancy.fraction:.0%}", LIMITERS.get(r.occupancy.limiter, "full")),
            *(str(n) for n in (r.mix.global_loads, r.mix.vector_loads, r.mix.shared_loads, r.mix.ffma)),
            str(r.mix.tensor_core),
        )
        previous = r.kernel
    return table


MIX_LEGEND = (
    "ld, st: bits that a thread loads from and stores to global memory, x how many\n"
    "stand in the code; copies by cp.async (cpa) count as loads. TMA: copies of\n"
    "tiles; lds, sts: shared memory; ffma: float32 multiply-adds; mma, wgmma, tc5:\n"
    "tensor core instructions of a warp, of four warps (Hopper), of data centre\n"
    "Blackwell. A loop body counts once."
)


def mix_table(title: str, reports: list[KernelReport]) -> Table:
    """What the kernels consist of, as a table of at most 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for column in ("kernel", "sm", "ld", "st"):
        table.add_column(column, no_wrap=column in ("kernel", "sm"))
    for column in ("cpa", "TMA", "lds", "sts", "ffma", "mma", "wgmma", "tc5"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = ""
    for r in reports:
        widths = r.mix.global_widths.items()
        loads, stores = (" ".join(f"{bits}x{n[side]}" for bits, n in widths if n[side]) for side in (0, 1))
        counts = [r.mix.async_copies, r.mix.bulk_copies, r.mix.shared_loads, r.mix.shared_stores]
        counts += [r.mix.ffma, r.mix.mma, r.mix.wgmma, r.mix.tcgen05]
        name = r.kernel if r.kernel != previous else ""
        table.add_row(name, r.arch.removeprefix("sm_"), loads or "-", stores or "-", *map(str, counts))
        previous = r.kernel
    return table
