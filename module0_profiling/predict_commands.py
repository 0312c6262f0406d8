"""`titan predict`: the speed of a model on a device before anything runs; `titan devices`: what is known of devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from module0_profiling.engine_overhead import Overhead
    from module0_profiling.model_costs import Formats
    from module0_profiling.model_shape import ModelShape
    from module0_profiling.predict import Machine, Prediction


def devices() -> None:
    """Datasheet facts of the devices that `titan predict --device` knows."""
    from rich.console import Console

    from module0_profiling.catalogue import catalogue

    console = Console()
    console.print(devices_table())
    for entry in catalogue().values():
        console.print(f"{entry.key}: {entry.name}. {entry.source}.", style="dim", markup=False, soft_wrap=True)


def predict(
    model: Annotated[str, typer.Option(help="A bundled name, a directory or a config.json.")] = "titan-tiny",
    device: Annotated[str, typer.Option(help="here, cpu, cuda, mps (measured), or one of `titan devices`.")] = "here",
    batch: Annotated[str, typer.Option(help="Sequences: 8, or 1,8,32, or 1..256 doubling.")] = "1..32",
    context: Annotated[str, typer.Option(help="Positions of each sequence, written like --batch.")] = "1024",
    prefill: Annotated[int, typer.Option(min=0, help="Predict reading prompts of N tokens instead of a decode.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of activations: bfloat16, float16, float32.")] = "bfloat16",
    weights: Annotated[str, typer.Option(help="Of linear layers: int4, int8, fp8, fp8-block; default: --dtype.")] = "",
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="Of the cache; default: --dtype.")] = "",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel devices.")] = 1,
    overhead_ms: Annotated[
        float | None,
        typer.Option("--overhead-ms", min=0, help="A step's calls and Python; default: measured here, else 0."),
    ] = None,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1, help="Share of a datasheet's peaks.")] = 1.0,
    tflops: Annotated[float, typer.Option(min=0, help="Matmul rate where none is published.")] = 0.0,
    link_gb_s: Annotated[float, typer.Option("--link-gb-s", min=0, help="Link between devices, one way.")] = 0.0,
    operations: Annotated[bool, typer.Option("--operations", help="Every operation of the first step.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Calibrate this machine again.")] = False,
) -> None:
    """Milliseconds a token, tokens a second and memory of a model, by batch and context, and what bounds it."""
    from rich.console import Console

    from module0_profiling import predict as prediction
    from module0_profiling.engine_overhead import Overhead
    from module0_profiling.model_costs import Formats
    from module0_profiling.model_shape import load_shape

    console = Console()
    shape, formats = load_shape(model), Formats(dtype, weights or None, kv_dtype or None)
    batches, contexts = prediction.parse_numbers(batch, "--batch"), prediction.parse_numbers(context, "--context")
    with console.status("measuring this machine"):
        target = resolve(device, shape, formats, efficiency=efficiency, tflops=tflops, link=link_gb_s, refresh=refresh)
    engine = target.engine if overhead_ms is None else Overhead(step=overhead_ms / 1e3)
    steps = [
        prediction.predict(
            shape,
            target.machine,
            sequences,
            prefill or length,
            tokens=prefill or 1,
            formats=formats,
            ranks=tp,
            engine=engine,
            overlap=target.overlap,
        )
        for length in (contexts if not prefill else contexts[:1])
        for sequences in batches
    ]
    what = f"reading prompts of {prefill} tokens" if prefill else "decoding"
    where = target.name + (f" x {tp}" if tp > 1 else "")
    title = f"{shape.name}, {what}, {_formats(formats)}, {where}: {target.machine.source}"
    console.print(title, highlight=False, markup=False)
    console.print(steps_table(steps, target.memory))
    if target.crowded:
        console.print("Other processes used the cores while this machine was measured: ask again when it is quiet.")
    console.print(f"Weights: {_number(steps[0].weights / 1e9)} GB a device.", highlight=False)
    if tp > 1:
        console.print("Between devices only bytes are counted, not the latency of each all-reduce.", highlight=False)
    if target.memory is not None:
        for length in [prefill] if prefill else contexts:
            most = prediction.largest_batch(shape, target.memory, length, formats, ranks=tp)
            free = f"{prediction.USABLE:.0%} of {target.memory / 1e9:,.0f} GB"
            console.print(f"Largest batch at {length} positions: {most} in {free}.", highlight=False)
    if operations:
        console.print(operations_table(steps[0]))


@dataclass(frozen=True)
class Target:
    """Where a prediction is for: a machine, its memory, and what an engine adds there."""

    name: str
    machine: Machine
    memory: float | None
    engine: Overhead
    overlap: bool = False
    crowded: bool = False  # other processes used the cores while this machine was measured


def resolve(
    device: str,
    shape: ModelShape,
    formats: Formats,
    *,
    efficiency: float = 1.0,
    tflops: float = 0.0,
    link: float = 0.0,
    refresh: bool = False,
) -> Target:
    """The target that `--device` names; here, cpu, cuda and mps are calibrated, which takes seconds once.

    Raises:
        DeviceError: no such device, with what exists.
    """
    from module0_profiling import catalogue, hardware
    from module0_profiling.calibration import calibrated
    from module0_profiling.engine_overhead import Overhead, measured_overhead
    from module0_profiling.model_costs import weight_bytes
    from module0_profiling.predict import Measured, Roofs
    from module0_profiling.timing import Crowd

    if device == "here" or device.partition(":")[0] in ("cpu", "cuda", "mps"):
        found = hardware.detect(None if device == "here" else device)
        crowd = Crowd()
        calibration = calibrated(found, formats.dtype, refresh=refresh)
        peaks = hardware.measured_peaks(found)
        machine = Measured(
            calibration,
            ridge=max(calibration.from_memory.values()) / peaks.read_bandwidth,
            cached=weight_bytes(shape, formats) < 0.75 * found.cache_bytes,
            widened=formats.weights not in (None, formats.dtype),
            link=link * 1e9 or None,
        )
        engine, _ = measured_overhead(found, calibration, refresh=refresh)
        on_gpu, memory = found.kind != "cpu", found.memory_bytes or None
        return Target(found.name, machine, memory, engine, overlap=on_gpu, crowded=not on_gpu and crowd.crowded)
    entry = catalogue.find(device)
    peaks = hardware.catalogue_peaks(entry)
    if tflops:
        peaks = replace(peaks, matmul={**dict.fromkeys((formats.dtype, formats.rate), tflops * 1e12), **peaks.matmul})
    roofs = Roofs(peaks, efficiency, link * 1e9 or entry.link)
    return Target(entry.name, roofs, entry.memory, Overhead(), overlap=entry.kind != "cpu")


def steps_table(steps: list[Prediction], memory: float | None) -> Table:
    """Predictions as a rich table, one row each."""
    drawn = _table("", ("batch", "context", "ms/step", "ms/token", "tokens/s", "KV GB", "fits", "bound by"))
    for step in steps:
        fits = {True: "yes", False: "no", None: "?"}[step.fits(memory)]
        drawn.add_row(
            str(step.batch),
            str(step.context),
            _number(step.seconds * 1e3),
            _number(1e3 / step.tokens_per_second),
            _number(step.tokens_per_second),
            _number(step.kv / 1e9),
            fits,
            step.bound_by,
        )
    return drawn


def operations_table(step: Prediction) -> Table:
    """Every operation of a step, all layers together: FLOPs, bytes, time, share, bound."""
    title = f"operations of a step: batch {step.batch}, {step.context} positions, {step.seconds * 1e3:.3g} ms"
    drawn = _table(title, ("operation", "times", "MFLOP", "MB", "ms", "share", "bound by"))
    for operation, seconds, bound in step.parts:
        sent = operation.times * operation.comm.bytes if operation.comm else operation.total.bytes
        drawn.add_row(
            operation.name,
            str(operation.times),
            _number(operation.total.flops / 1e6),
            _number(sent / 1e6),
            _number(seconds * 1e3),
            f"{100 * seconds / step.seconds:.1f} %",
            bound,
        )
    if step.overhead:
        share = f"{100 * step.overhead / step.seconds:.1f} %"
        drawn.add_row("engine", "", "", "", _number(step.overhead * 1e3), share, "overhead")
    return drawn


def devices_table() -> Table:
    """The catalogue as a rich table; what a document does not state is a dash."""
    from module0_profiling.catalogue import catalogue

    columns = ("--device", "GB/s", "GB", "bf16", "fp8", "int8", "fp32", "cache MiB", "units")
    drawn = _table("datasheets; rates are dense, in TFLOP/s", columns, left=("--device",))
    for entry in catalogue().values():
        rates = (entry.rates.get(dtype, 0) / 1e12 for dtype in ("bfloat16", "fp8", "int8", "float32"))
        sizes = (entry.bandwidth / 1e9, (entry.memory or 0) / 1e9, *rates, (entry.cache or 0) / 2**20, entry.units or 0)
        drawn.add_row(entry.key, *(f"{size:,.5g}" if size else "-" for size in sizes))
    return drawn


def _table(title: str, columns: tuple[str, ...], left: tuple[str, ...] = ("operation",)) -> Table:
    from rich import box
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        drawn.add_column(column, justify="left" if column in left or column == "bound by" else "right")
    return drawn


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _formats(formats: Formats) -> str:
    extra = [f"{formats.weights} weights"] if formats.weights else []
    extra += [f"{formats.kv} cache"] if formats.kv else []
    return " ".join([formats.dtype, *extra])


def register(app: typer.Typer) -> None:
    """Add the commands to `titan`."""
    app.command()(predict)
    app.command()(devices)
