"""Measure what one device reaches from torch: read bandwidth, copy bandwidth, matmul rate per dtype.

Bandwidth needs a loop that does almost nothing per byte, and which torch operation that is depends on the machine: a
bfloat16 matrix-vector product saturates the memory of a CPU with AMX, and is bound by arithmetic on one without. So
several ways to read are tried and the fastest counts. Peaks are maxima: the best round of each, never the mean.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from module0_profiling.device import Device, total_memory
from module0_profiling.hardware import Peaks
from module0_profiling.timing import Clock, clock_for

if TYPE_CHECKING:
    import torch

READ_SECONDS = 0.7
COPY_SECONDS = 0.25
MATMUL_SECONDS = 0.35  # for each dtype
DTYPES = ("bfloat16", "float16", "float32")
CRAWLS = 0.05  # a dtype below this share of the fastest one has no hardware behind it
COLUMNS = 4096
TRIES = 3


def measure(device: Device) -> Peaks:
    """Measure the peaks of a device: about 3 s on a CPU, less on a GPU.

    Uses every core whatever torch was told, and restores that afterwards. Allocates 512 MiB or four times the last
    cache, whichever is more, and at most a quarter of the memory.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    clock = clock_for(device.torch_name)
    with _all_cores(device):
        buffer = _random_buffer(buffer_bytes(device), device.torch_name)
        read, method = read_bandwidth(buffer, clock)
        copy = copy_bandwidth(buffer, clock)
        del buffer
        rates = {dtype: matmul_rate(dtype, device.torch_name, clock) for dtype in DTYPES}
    fastest = max(rates.values())
    return Peaks(
        read_bandwidth=max(read, copy),  # a copy reads and writes: no machine reads slower than it copies
        copy_bandwidth=copy,
        matmul={dtype: rate for dtype, rate in rates.items() if rate > CRAWLS * fastest},
        source="measured",
        read_method=method if read >= copy else "copy",
        fingerprint=device.fingerprint,
        load=round(load, 2),
    )


def read_bandwidth_now(device: Device) -> float:
    """Read bandwidth alone, bytes/s, in about a second: for a share whose two sides are measured in turns.

    The memory's rate is not a constant: a virtual machine's cores can move between cache complexes, and the rate of two
    cores together was seen to double, and halve again, within a minute.
    """
    with _all_cores(device):
        buffer = _random_buffer(buffer_bytes(device), device.torch_name)
        return read_bandwidth(buffer, clock_for(device.torch_name))[0]


def buffer_bytes(device: Device) -> int:
    """Bytes to stream: too many for any cache to help, few enough to fit. A multiple of 32 MiB."""
    wanted = max(512 << 20, 4 * device.cache_bytes)
    if device.kind == "cuda":
        wanted = max(wanted, 2 << 30)  # at terabytes a second, 512 MiB is over before the clocks have settled
    memory = device.memory_bytes or total_memory()
    most = memory // 4 if memory else wanted
    return max(32 << 20, min(wanted, most) // (32 << 20) * (32 << 20))


def read_bandwidth(buffer: torch.Tensor, clock: Clock, seconds: float = READ_SECONDS) -> tuple[float, str]:
    """Best bytes/s over the ways to read a bfloat16 buffer, and the name of the way that reached it."""
    import torch
    import torch.nn.functional as F

    as_bf16 = buffer.view(-1, COLUMNS)
    as_fp32 = buffer.view(torch.float32).view(-1, COLUMNS)
    row_bf16 = torch.randn(1, COLUMNS, device=buffer.device).to(torch.bfloat16)
    row_fp32 = row_bf16[0].float()
    ways: dict[str, Callable[[], object]] = {
        "float32 sum": as_fp32.sum,
        "float32 max": as_fp32.max,
        "float32 matrix-vector": lambda: torch.mv(as_fp32, row_fp32),
        "bfloat16 matrix-vector": lambda: F.linear(row_bf16, as_bf16),
    }
    deadline = time.perf_counter() + seconds
    taken = {name: [clock(way)] for name, way in ways.items()}
    while time.perf_counter() < deadline:
        # Two thirds as fast after one try is worth another: the first call of each also paid for its start.
        fastest = min(min(times) for times in taken.values())
        for name, way in ways.items():
            if min(taken[name]) <= 1.5 * fastest:
                taken[name].append(clock(way))
    winner = min(taken, key=lambda name: _shortest(taken[name]))
    return buffer.nbytes / _shortest(taken[winner]), winner


def copy_bandwidth(buffer: torch.Tensor, clock: Clock, seconds: float = COPY_SECONDS) -> float:
    """Best bytes/s, read plus written, of copying one half of the buffer over the other."""
    source, target = buffer.view(-1).chunk(2)
    best, _ = _best_until(lambda: target.copy_(source), clock, seconds)
    return (source.nbytes + target.nbytes) / best


def matmul_rate(dtype: str, device: str, clock: Clock, seconds: float = MATMUL_SECONDS) -> float:
    """Best FLOP/s of square products of random matrices, doubling the size while the time allows it; 0 if unsupported.

    A dtype without hardware support can be a thousand times slower than its neighbour: the size only doubles when the
    eightfold work is expected to fit into what is left.
    """
    import torch

    deadline = time.perf_counter() + seconds
    size, best = 256, 0.0
    largest = 4096 if device == "cpu" else 8192
    while size <= largest:
        try:
            left = torch.randn(size, size, device=device).to(getattr(torch, dtype))
            right = torch.randn(size, size, device=device).to(getattr(torch, dtype))
            product = _matmul(left, right)
            # The first call of a size chooses its kernel; one call can fall into a neighbour's turn on a busy machine.
            took = min(clock(product) for _ in range(TRIES))
        except (RuntimeError, TypeError):  # not implemented for this dtype, or out of memory
            return best
        best = max(best, 2 * size**3 / took)
        left_over = deadline - time.perf_counter()
        if size == largest or TRIES * 8 * took > left_over:
            took, _ = _best_until(product, clock, max(0.0, left_over))
            return max(best, 2 * size**3 / took)
        size *= 2
    return best


def _matmul(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    return lambda: left @ right


def _best_until(fn: Callable[[], object], clock: Clock, seconds: float) -> tuple[float, int]:
    """Shortest run and number of runs until the time is over; at least one."""
    deadline = time.perf_counter() + seconds
    taken = [clock(fn)]
    while time.perf_counter() < deadline:
        taken.append(clock(fn))
    return _shortest(taken), len(taken)


def _shortest(times: list[float]) -> float:
    """The second shortest where there are three: a virtual machine's clock can jump, and once showed twice the peak."""
    return sorted(times)[1 if len(times) > 2 else 0]


def _random_buffer(size: int, device: str) -> torch.Tensor:
    """A bfloat16 buffer of `size` bytes (a multiple of 32 MiB): one random block, repeated, as that is quicker.

    Two bfloat16 numbers viewed as one float32 are again an ordinary number, so the same buffer serves both.
    """
    import torch

    buffer = torch.empty(size // 2, dtype=torch.bfloat16, device=device)
    block = torch.randn(1 << 20, device=device).to(torch.bfloat16)
    buffer.view(-1, block.numel()).copy_(block.expand(size // 2 // block.numel(), -1))
    return buffer


@contextmanager
def _all_cores(device: Device) -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    try:
        if device.kind == "cpu":
            torch.set_num_threads(max(1, device.units))
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
