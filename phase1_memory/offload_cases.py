"""Benchmark cases of KV offload: how fast each tier takes blocks and gives them back, and what of it the engine sees.

A block is that of TinyLlama-1.1B: 22 layers x 2 x 16 tokens x 4 heads x 64 x bfloat16 = 360,448 bytes.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from module0_profiling.results import Figure
from module0_profiling.timing import Timing, interleave
from phase1_memory.offload import OffloadStore
from phase1_memory.offload_file import FileTier
from phase1_memory.offload_tiers import RamTier, Slots, Tier, host_blocks

TINYLLAMA_BLOCK = 22 * 2 * 16 * 4 * 64 * 2


@dataclass(frozen=True)
class Sizes:
    """What is moved: bytes of a block, blocks of a request; and the matmul [side, side] that copies hide behind."""

    block_bytes: int = TINYLLAMA_BLOCK
    counts: tuple[int, ...] = (1, 16, 64)
    side: int = 1024


FULL = Sizes()
DRY = Sizes(block_bytes=8192, counts=(1, 3), side=64)


def tiers(
    device_name: str, rounds: int, console: Console, sizes: Sizes = FULL, directory: Path | None = None
) -> tuple[Figure, ...]:
    """Each tier by itself, no thread: GB/s of writing and of reading back, sums included.

    Args:
        device_name: of the blocks.
        rounds: of each.
        console: shows what is running.
        sizes: of blocks and requests.
        directory: on the disk to measure; by default that of temporary files.
    """
    device, most = torch.device(device_name), max(sizes.counts)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        made: dict[str, Tier] = {
            "file": FileTier(Path(folder), most, sizes.block_bytes),
            "file, page cache": FileTier(Path(folder), most, sizes.block_bytes, direct=False),
        }
        if device.type == "cuda":  # where the engine runs in host memory, the tier keeps the tensor and copies nothing
            made["memory"] = RamTier(most, sizes.block_bytes, pin=True)
        for count in sizes.counts:
            blocks = {name: _blocks(count, sizes, device, host=tier.waits) for name, tier in made.items()}
            slots = {name: tier.take(count) or () for name, tier in made.items()}
            with console.status(f"{count} blocks"):
                writes = _timed({n: partial(_written, t, slots[n], blocks[n]) for n, t in made.items()}, rounds, device)
                reads = _timed({n: partial(t.read, slots[n], device) for n, t in made.items()}, rounds, device)
            for name, tier in made.items():
                tier.free(slots[name])
                for what, timing in (("write", writes[name]), ("read", reads[name])):
                    figures.append(_rate(f"{name}, {what}/{count} blocks", count * sizes.block_bytes, timing))
        for tier in made.values():
            tier.close()
    return tuple(figures)


def checksums(rounds: int, sizes: Sizes = FULL) -> tuple[Figure, ...]:
    """GB/s of sums of one block on one core: CRC-32, and the sum of products that numpy can do without a loop."""
    block = np.frombuffer(np.random.default_rng(0).bytes(sizes.block_bytes), dtype=np.uint64)
    random = np.random.default_rng(1)
    keys = [random.integers(0, 1 << 64, block.size, dtype=np.uint64) for _ in range(2)]
    scratch = np.empty_like(block)
    sums: dict[str, Callable[[], object]] = {
        "crc32": partial(zlib.crc32, block.data),
        "multilinear": partial(multilinear, block, keys, scratch),
    }
    timings = interleave(sums, rounds=rounds)
    return tuple(_rate(name, sizes.block_bytes, timing) for name, timing in timings.items())


def multilinear(words: np.ndarray, keys: list[np.ndarray], scratch: np.ndarray) -> int:
    """A universal sum: low and high halves of the words times random keys (Lemire, Kaser, 2014, arXiv 1202.4961).

    Args:
        words: [n] uint64.
        keys: two of [n] uint64, random and fixed: 16 bytes for 8 of data.
        scratch: [n] uint64.
    """
    np.multiply(words, keys[0], out=scratch)
    total = int(scratch.sum())
    np.right_shift(words, np.uint64(32), out=scratch)
    np.multiply(scratch, keys[1], out=scratch)
    return (total + int(scratch.sum())) >> 32 & 0xFFFFFFFF


def overlap(
    device_name: str, rounds: int, console: Console, sizes: Sizes = FULL, directory: Path | None = None
) -> tuple[Figure, ...]:
    """How much of saving and of prefetching the largest request hides behind matmuls of about the same time.

    "together / longer alone" is 1 where the shorter of the two is hidden whole and 2 where they follow one another. (On
    a CPU whose cores all multiply, the sums of a file's blocks take time from them.) "engine waits" is what `save`, and
    `load` of what has arrived, keep the engine's thread.
    """
    device, count = torch.device(device_name), max(sizes.counts)
    blocks, figures = _blocks(count, sizes, device), list[Figure]()
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        made: dict[str, Callable[[], Tier]] = {"file": lambda: FileTier(Path(folder), 2 * count, sizes.block_bytes)}
        if device.type == "cuda":
            made["memory"] = lambda: RamTier(2 * count, sizes.block_bytes, pin=True)
        for name, make in made.items():
            for what, moves in (("save", _save), ("prefetch", _prefetch)):
                with (
                    console.status(f"overlap, {name}, {what}"),
                    OffloadStore([make()], sizes.block_bytes, device) as store,
                ):
                    figures += _overlap(f"{name}, {what}", partial(moves, store, blocks), device, sizes.side, rounds)
    return tuple(figures)


@dataclass(frozen=True)
class _Seconds:
    total: float
    engine: float  # of which the engine's thread spent in the store's call


def _save(store: OffloadStore, blocks: Tensor, compute: Callable[[], object]) -> _Seconds:
    """Save beside `compute`, until the blocks are where they should be."""
    copy = blocks.clone()
    with _synchronised(blocks.device):
        began = time.perf_counter()
        store.save("request", copy)
        saved = time.perf_counter()
        compute()
        _settle(store)
    ended = time.perf_counter()
    store.drop("request")
    return _Seconds(ended - began, saved - began)


def _prefetch(store: OffloadStore, blocks: Tensor, compute: Callable[[], object]) -> _Seconds:
    """Prefetch beside `compute`, until the blocks are on the device."""
    store.save("request", blocks.clone())
    _settle(store)
    with _synchronised(blocks.device):
        began = time.perf_counter()
        store.prefetch("request")
        compute()
        while not store.ready("request"):
            time.sleep(1e-4)
        arrived = time.perf_counter()
        store.load("request")
    ended = time.perf_counter()
    return _Seconds(ended - began, ended - arrived)


def _overlap(
    name: str, move: Callable[[Callable[[], object]], _Seconds], device: torch.device, side: int, rounds: int
) -> Iterator[Figure]:
    matrix = torch.randn(side, side, device=device)
    waited: list[float] = []

    def matmuls(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    def compute_alone(times: int) -> float:
        with _synchronised(device):
            began = time.perf_counter()
            matmuls(times)
        return time.perf_counter() - began

    def moved(compute: Callable[[], object]) -> float:
        seconds = move(compute)
        waited.append(seconds.engine)
        return seconds.total

    times = 4
    for _ in range(3):  # as many matmuls as take about as long as the move
        times = max(1, round(times * moved(lambda: None) / compute_alone(times)))
    waited.clear()
    found = _own_clock(
        {
            "move": partial(moved, lambda: None),
            "matmuls": partial(compute_alone, times),
            "both": partial(moved, partial(matmuls, times)),
        },
        rounds,
    )
    longer = max(found["move"].median, found["matmuls"].median)
    yield Figure(f"{name}, together / longer alone", found["both"].median / longer, "x", found["both"].spread)
    yield Figure(f"{name}, engine waits", Timing(tuple(waited)).median, "s", Timing(tuple(waited)).spread)


def _own_clock(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Functions in turns that return their seconds themselves: what they prepare is not counted."""
    taken: list[float] = []
    notes = {name: (lambda call=call: taken.append(call())) for name, call in subjects.items()}

    def clock(note: Callable[[], object]) -> float:
        note()
        return taken.pop()

    return interleave(notes, rounds=rounds, clock=clock)


def _settle(store: OffloadStore) -> None:
    while store.pending_bytes:
        time.sleep(1e-4)


def _written(tier: Tier, slots: Slots, blocks: Tensor) -> None:
    tier.write(slots, blocks)


def _blocks(count: int, sizes: Sizes, device: torch.device, host: bool = False) -> Tensor:
    """Random bytes on the device; for a file, in host memory as the store stages it."""
    random = torch.randint(0, 256, (count, sizes.block_bytes), dtype=torch.uint8)
    if host and device.type == "cuda":
        return host_blocks(count, sizes.block_bytes, pin=True).copy_(random)
    return random if host else random.to(device)


def _timed(subjects: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """In turns, by wall time: both a disk and a stream are waited for."""

    def clock(call: Callable[[], object]) -> float:
        with _synchronised(device):
            began = time.perf_counter()
            call()
        return time.perf_counter() - began

    return interleave(subjects, rounds=rounds, clock=clock)


@contextmanager
def _synchronised(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(name: str, nbytes: int, timing: Timing) -> Figure:
    return Figure(name, nbytes / timing.median / 1e9, "GB/s", timing.spread)
