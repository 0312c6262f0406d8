"""Benchmark cases of the allocators: a step's time, the pieces that requests lie in, and what pieces cost.

The cache is that of TinyLlama-1.1B in bfloat16: 22 layers, keys and values, blocks of 16 tokens x 4 heads x 64.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.course.parts import Use, resolve
from module0_profiling.results import Figure
from module0_profiling.timing import Timing, interleave
from phase1_memory.allocator import BuddyAllocator
from phase1_memory.allocator_checks import HEADROOM, Make, mean_runs, replay, replay_arrays, settled, step_clock
from phase1_memory.rust_allocator import RustBuddyAllocator, why_not_rust

FILLS = (0.5, 0.7, 0.8, 0.9, 0.95)
HEADROOMS = (1, 4, 16, 64, 256)
LAYOUTS = {"one run": 0, "runs of 8": 8, "single blocks": 1}  # blocks in a run; 0: all


@dataclass(frozen=True)
class Sizes:
    """What is gathered: blocks [page, heads, dim] of keys and of values in each layer of a cache.

    Attributes:
        num_blocks: of the cache.
        requests: their sizes in blocks.
    """

    layers: int = 22
    block: tuple[int, int, int] = (16, 4, 64)
    num_blocks: int = 1024
    requests: tuple[int, ...] = (64, 256)


FULL = Sizes()
DRY = Sizes(layers=2, block=(2, 1, 4), num_blocks=64, requests=(16,))


def allocator(options: Options) -> tuple[Figure, ...]:
    """Time of a step by allocator; runs per request and length of holes by share of the blocks taken and headroom."""
    return (*step_figures(options), *pieces(options))


def step_figures(options: Options) -> tuple[Figure, ...]:
    """Microseconds of a step of 1000 growing requests, and how many times faster Rust is."""
    makes = _makes()
    asked = {name: settled(make).run(options.size(300, 2)).asked for name, make in makes.items()}
    subjects = {name: partial(replay, make, asked[name]) for name, make in makes.items()}
    if "Rust" in makes:
        subjects["Rust, arrays"] = partial(replay_arrays, asked["Rust"])
    found = interleave(subjects, rounds=options.rounds, clock=step_clock)
    figures = [figure(f"step/{name}", [s * 1e6 for s in timing.seconds], "us") for name, timing in found.items()]
    for name in found:
        if name.startswith("Rust"):
            figures.append(ratio(f"{name}, speedup", found["Python"].seconds, found[name].seconds))
    return tuple(figures)


def pieces(options: Options) -> tuple[Figure, ...]:
    """How many runs a request lies in, and how long the holes are: counts, the same on every machine."""
    makes: dict[str, Make] = {"free list": _free_list}
    buddy = BuddyAllocator if why_not_rust() else RustBuddyAllocator  # the same answers, sooner
    makes |= {f"headroom {headroom}": partial(buddy, headroom=headroom) for headroom in HEADROOMS}
    figures: list[Figure] = []
    for fill in FILLS[-1:] if options.dry else FILLS:
        for name, make in makes.items():
            with options.console.status(f"{fill:.0%} taken, {name}"):
                scenario = settled(make, fill, requests=options.size(1000, 20))
                row = f"{fill:.0%} taken, {name}"
                figures.append(Figure(f"{row}/runs per request", mean_runs(scenario, options.size(40, 1), 100), ""))
                holes = scenario.holes()
                figures.append(Figure(f"{row}/blocks in a hole", sum(hole.length for hole in holes) / len(holes), ""))
    return tuple(figures)


def runs(options: Options) -> tuple[Figure, ...]:
    """GB/s of a request's keys and values when it lies in one run, in runs of 8, and in single blocks.

    They are gathered into one tensor on the device (what an attention that wants one piece must do), and copied out to
    the host, which is how a request is swapped out. On CUDA that memory is pinned, and each run is a cudaMemcpyAsync of
    its own; a CPU copies to memory of its own.
        index_select    one operator for each layer and side, whatever the layout; to copy out, then a copy of the whole
        copies          one copy for each run, layer and side
    """
    sizes, device = DRY if options.dry else FULL, torch.device(options.device)
    shape = (sizes.num_blocks, *sizes.block)
    sides = [torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2 * sizes.layers)]
    figures: list[Figure] = []
    for number in sizes.requests:
        out = torch.empty((len(sides), number, *sizes.block), dtype=torch.bfloat16, device=device)
        host = torch.empty(out.shape, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
        subjects: dict[str, Callable[[], object]] = {}
        for layout, length in LAYOUTS.items():
            blocks = _laid_out(number, length or number, sizes.num_blocks)
            index = torch.tensor(blocks, device=device)
            spans = list(_spans(blocks))
            subjects |= {
                f"gather, {layout}/index_select": partial(_select, sides, index, out),
                f"gather, {layout}/copies": partial(_copy, sides, spans, out),
                f"copy out, {layout}/index_select": partial(_select_and_copy, sides, index, out, host),
                f"copy out, {layout}/copies": partial(_copy, sides, spans, host),
            }
        with options.console.status(f"{number} blocks"):
            timings = interleave(subjects, rounds=options.rounds, device=options.device)
        moved = out.numel() * out.itemsize
        figures += [_rate(f"{number} blocks, {name}", moved, timing) for name, timing in timings.items()]
    return tuple(figures)


def _makes() -> dict[str, Make]:
    makes: dict[str, Make] = {"free list": _free_list, "Python": partial(BuddyAllocator, headroom=HEADROOM)}
    if why_not_rust() is None:
        makes["Rust"] = partial(RustBuddyAllocator, headroom=HEADROOM)
    return makes


def _free_list(num_blocks: int) -> BuddyAllocator:
    framework = resolve("phase1_memory", "allocator", Use.parse("phase1=framework"))
    return framework.BuddyAllocator(num_blocks)  # type: ignore[no-any-return]


def _laid_out(number: int, length: int, num_blocks: int) -> list[int]:
    """Blocks of a request in runs of `length`, which lie in no order, with at least a block between them."""
    places = random.Random(0).sample(range(num_blocks // (length + 1)), number // length)
    return [place * (length + 1) + at for place in places for at in range(length)]


def _spans(blocks: list[int]) -> Iterator[tuple[slice, slice]]:
    """Runs of neighbours as (places in the list, blocks)."""
    begins = [at for at, block in enumerate(blocks) if not at or block != blocks[at - 1] + 1]
    for begin, end in zip(begins, [*begins[1:], len(blocks)], strict=True):
        yield slice(begin, end), slice(blocks[begin], blocks[begin] + end - begin)


def _select(sides: list[Tensor], index: Tensor, out: Tensor) -> None:
    for side, to in zip(sides, out.unbind(), strict=True):
        torch.index_select(side, 0, index, out=to)


def _select_and_copy(sides: list[Tensor], index: Tensor, out: Tensor, host: Tensor) -> None:
    _select(sides, index, out)
    host.copy_(out, non_blocking=True)


def _copy(sides: list[Tensor], spans: list[tuple[slice, slice]], out: Tensor) -> None:
    for (to, blocks), (side, target) in product(spans, zip(sides, out.unbind(), strict=True)):
        target[to].copy_(side[blocks], non_blocking=True)


def _rate(name: str, moved: int, timing: Timing) -> Figure:
    return figure(name, [moved / seconds / 1e9 for seconds in timing.seconds], "GB/s")
