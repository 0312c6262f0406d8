"""Benchmark cases of the linear layers alone: F.linear and packed weights by rows, and their place on the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from module0_profiling import costs, roofline
from module0_profiling.course.needs import absent
from module0_profiling.hardware import detect, measured_peaks
from module0_profiling.results import Figure
from module0_profiling.timing import Timing
from phase0_prototype import matvec
from phase0_prototype.linear import Dense, Linear, LinearFormat, OneDNNPacked, Part
from phase0_prototype.workloads import Run, in_turns

ROWS = (1, 8, 32, 128, 1024)
LAYERS = 8  # of the 22 of the 1.1B shape: 700 MB of weights, far beyond any cache
SHAPES = ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632))  # qkv, o, gate and up, down: [out, in]
Products = Callable[[dict[int, torch.Tensor]], object]
PARAMETERS = LAYERS * sum(out * width for out, width in SHAPES)


@dataclass(frozen=True)
class Sizes:
    """What is multiplied: rows of the input, shapes [out, in] of a layer's weights, layers."""

    rows: tuple[int, ...] = ROWS
    shapes: tuple[tuple[int, int], ...] = SHAPES
    layers: int = LAYERS


FULL = Sizes()
DRY = Sizes(rows=(2,), shapes=((32, 64), (64, 32)), layers=1)


def times(device_name: str, rounds: int, console: Console, sizes: Sizes = FULL) -> dict[tuple[int, str], Timing]:
    """Seconds to multiply by all layers once, by (rows, format), the formats in turns; `matvec` has one row only."""
    device = torch.device(device_name)
    formats: dict[str, LinearFormat] = {"F.linear": Dense()}
    if not OneDNNPacked.why_not(device, torch.bfloat16):
        formats["packed"] = OneDNNPacked()
    stacks = {name: _stack(number_format, device, sizes) for name, number_format in formats.items()}
    found: dict[tuple[int, str], Timing] = {}
    for rows in sizes.rows:
        widths = {width for _, width in sizes.shapes}
        inputs = {w: torch.randn(rows, w, device=device).to(torch.bfloat16) for w in sorted(widths)}
        subjects = {name: partial(_once, partial(_products, stack), inputs) for name, stack in stacks.items()}
        if rows == 1 and device.type == "cpu" and not absent("compiler"):
            subjects["matvec"] = partial(_once, _compiled(stacks["F.linear"]), inputs)
        for name, runs in in_turns(subjects, rounds, console).items():
            found[rows, name] = Timing(tuple(run.decode for run in runs))
    return found


def linear(device: str, rounds: int, console: Console, sizes: Sizes = FULL) -> tuple[Figure, ...]:
    """Bandwidth and rate of each format at each number of rows."""
    figures: list[Figure] = []
    for (rows, name), timing in times(device, rounds, console, sizes).items():
        read, flops = 2 * PARAMETERS / timing.median / 1e9, 2 * PARAMETERS * rows / timing.median / 1e12
        figures.append(Figure(f"{rows} rows/{name}, GB/s", read, "GB/s", timing.spread))
        figures.append(Figure(f"{rows} rows/{name}, TFLOP/s", flops, "TFLOP/s", timing.spread))
    return tuple(figures)


def on_the_roofline(device: str, rounds: int, console: Console) -> tuple[Figure, ...]:
    """The same products as points under this machine's ceilings, measured in the same run."""
    found = times(device, rounds, console)
    peaks = measured_peaks(detect(device), refresh=True)
    points = []
    for (rows, name), timing in found.items():
        parts = [costs.linear(rows, width, out) for out, width in SHAPES]
        work = sum(parts, roofline.Work(0, 0)) * LAYERS
        points.append(roofline.Point.measured(f"{name}, {rows} rows", work, timing.median))
    return roofline.to_figures(points, peaks)


def _stack(number_format: LinearFormat, device: torch.device, sizes: Sizes) -> list[Linear]:
    layers = []
    for out, width in sizes.shapes * sizes.layers:
        layer = Linear(
            (Part("w", out),), width, bias=False, number_format=number_format, dtype=torch.bfloat16, device=device
        )
        layer.destinations()["w.weight"].load(torch.randn(out, width).to(torch.bfloat16))
        layers.append(layer)
    return layers


def _products(stack: list[Linear], inputs: dict[int, torch.Tensor]) -> None:
    for layer in stack:
        layer(inputs[layer.in_features])


def _compiled(stack: list[Linear]) -> Products:
    """The layers as a compiled step runs them: one function, and none can start before the one before it has ended."""
    matvec.prepare()

    @torch.compile(dynamic=False)
    def products(weights: list[torch.Tensor], inputs: dict[int, torch.Tensor]) -> torch.Tensor:
        out = torch.zeros(1, 1)
        for weight in weights:
            out = matvec.matvec(inputs[weight.shape[1]] + out[0, 0], weight, None)
        return out

    return partial(products, [layer.weight for layer in stack])


def _once(products: Products, inputs: dict[int, torch.Tensor]) -> Run:
    device = next(iter(inputs.values())).device
    began = time.perf_counter()
    with torch.inference_mode():
        products(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return Run(0.0, time.perf_counter() - began, 1, [])
