"""How fast this machine runs a decoder's operations as an engine runs them: measured in seconds, kept beside the peaks.

A peak is the best that one ideal loop reaches. An engine multiplies one row by packed weights, small matrices as well
as large ones, hands results from one operation to the next, and attends with short queries. Each of these is timed here
alone, with plain torch and no engine, on sizes that no prediction depends on. (What Python and operator calls add is
the engine's: `engine_overhead.py`.) Nothing is fitted: a prediction that is off says that something is missing from the
model of the machine (`predict.py`), and the benchmark `predict` of phase 0 says by how much.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from module0_profiling import attention_costs, costs
from module0_profiling.device import Device
from module0_profiling.hardware import cache_path
from module0_profiling.results import write_atomically
from module0_profiling.timing import Clock, Crowd, clock_for

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS = (1, 8, 32, 128, 1024)
LARGE = (5632, 2048)  # [out, in]; eight of them are far beyond any last cache but a server's
SMALL = ((320, 320), (1024, 1024))  # four of the larger ones in bfloat16 are 8 MB
SECONDS = 0.2  # for each measurement
BUSY = 0.75  # other processes for each core, above which what was measured on a CPU is not kept
TOKENS, CONTEXTS, BATCH = (96, 512), (96, 1024), 8
ELEMENTWISE = ((96, 192), (96, 768), (768, 2048))  # rows, width
KINDS = ("norm", "rope", "kv", "elementwise")
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 64


@dataclass(frozen=True)
class Calibration:
    """Rates of one device in one dtype; medians, for a prediction is of a usual run and not of the best one.

    Attributes:
        dtype: of activations and weights.
        method: how the linear layers were run: "packed oneDNN" or "F.linear".
        from_memory: rows -> FLOP/s of linear layers whose weights come from memory.
        from_cache: numbers in the matrix -> rows -> FLOP/s of linear layers whose weights stay in the last cache.
        bandwidth: bytes/s of weights that a product of one row reads from memory.
        prefill: tokens -> FLOP/s of causal attention over a prompt.
        decode: positions -> bytes/s of the cache that attention of one query a sequence reads.
        elementwise: kind -> bytes -> bytes/s, by the fewest bytes and as plain operators, behind a product: "norm" with
            the residual addition, "rope", "kv" (writing keys and values), and "elementwise" (silu(gate) * up).
        threads: of torch.
        fingerprint: of the device.
        load: 1-minute load average before.
    """

    dtype: str
    method: str
    from_memory: dict[int, float]
    from_cache: dict[int, dict[int, float]]
    bandwidth: float
    prefill: dict[int, float]
    decode: dict[int, float]
    elementwise: dict[str, dict[int, float]]
    threads: int
    fingerprint: str
    load: float = 0.0


def calibrated(device: Device, dtype: str = "bfloat16", *, refresh: bool = False) -> Calibration:
    """The kept calibration of a device, dtype and number of threads, or a new one; a bad cache costs a measurement.

    What was measured on a busy CPU is returned and not kept: two loops that wait for each other run at a thousandth.
    """
    import torch

    key = f"{device.fingerprint}, {dtype}, {torch.get_num_threads()} threads"
    entries = _read()
    if not refresh and key in entries:
        return entries[key]
    crowd, found = Crowd(), calibrate(device, dtype)
    if device.kind != "cpu" or not (crowd.crowded or found.load > BUSY * max(1, device.units)):
        _write({**entries, key: found})
    return found


def calibrate(device: Device, dtype: str = "bfloat16") -> Calibration:
    """Measure now: about 4 s on a CPU with two cores. Threads stay as torch has them."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    kind, clock = getattr(torch, dtype), clock_for(device.torch_name)
    product, method = _product(device, kind)
    with torch.inference_mode():
        large = _weights(LARGE, 8, device, kind, product)
        from_memory = {rows: _linear_rate(large, rows, LARGE, device, kind, clock) for rows in ROWS}
        del large
        from_cache = {}
        for shape in SMALL:
            small = _weights(shape, 4, device, kind, product)
            rates = {rows: _linear_rate(small, rows, shape, device, kind, clock) for rows in ROWS}
            from_cache[shape[0] * shape[1]] = rates
        return Calibration(
            dtype=dtype,
            method=method,
            from_memory=from_memory,
            from_cache=from_cache,
            bandwidth=from_memory[1] / 2 * kind.itemsize,  # one row: two FLOPs a weight
            prefill={tokens: _prefill_rate(tokens, device, kind, clock) for tokens in TOKENS},
            decode={context: _decode_rate(context, device, kind, clock) for context in CONTEXTS},
            elementwise=_elementwise_rates(device, kind, clock, product),
            threads=torch.get_num_threads(),
            fingerprint=device.fingerprint,
            load=round(load, 2),
        )


def rate_at(rates: Mapping[int, float], size: float) -> float:
    """A rate between the measured sizes: straight lines on log-log paper, flat beyond the first and the last."""
    known = sorted(rates)
    size = min(max(size, known[0]), known[-1])
    above = next(i for i, each in enumerate(known) if each >= size)
    if known[above] == size:
        return rates[known[above]]
    low, high = known[above - 1], known[above]
    share = math.log(size / low) / math.log(high / low)
    return float(rates[low] * (rates[high] / rates[low]) ** share)


Product = Callable[["Tensor", "Tensor"], "Tensor"]


def _product(device: Device, kind: torch.dtype) -> tuple[Product, str]:
    """x [T, in] by a weight as `_weights` made it. bfloat16 on a CPU: oneDNN's packed order, if torch has it."""
    import torch
    from torch.nn import functional as F

    if device.kind == "cpu" and kind == torch.bfloat16:
        try:
            probe = torch.ones(32, 32, dtype=kind)
            packed = torch.ops.mkldnn._reorder_linear_weight(probe, 1)
            torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
        except (AttributeError, RuntimeError):
            return F.linear, "F.linear"
        return lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), "packed oneDNN"
    return F.linear, "F.linear"


def _weights(
    shape: tuple[int, int], count: int, device: Device, kind: torch.dtype, product: Product
) -> list[tuple[Product, Tensor]]:
    import torch
    from torch.nn import functional as F

    found = [torch.randn(shape, device=device.torch_name).to(kind) for _ in range(count)]
    if product is not F.linear:
        found = [torch.ops.mkldnn._reorder_linear_weight(weight, 1) for weight in found]
    return [(product, weight) for weight in found]


def _linear_rate(
    weights: list[tuple[Product, Tensor]],
    rows: int,
    shape: tuple[int, int],
    device: Device,
    kind: torch.dtype,
    clock: Clock,
) -> float:
    """FLOP/s of all weights in turn at few rows, so that they come from where they lie; of one of them at many.

    Square matrices are a chain, as in an engine: a core then reads rows that another one wrote, which takes longer
    where the two share no cache.
    """
    import torch

    x = torch.randn(rows, shape[1], device=device.torch_name).to(kind)
    chain = shape[0] == shape[1]
    used = weights if chain or rows < 100 else weights[:1]

    def once() -> None:
        y = x
        for product, weight in used:
            out = product(y, weight)
            y = out if chain else y

    return 2 * rows * shape[0] * shape[1] * len(used) / _median(once, clock)


def _prefill_rate(tokens: int, device: Device, kind: torch.dtype, clock: Clock) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def heads(count: int) -> Tensor:
        return torch.randn(tokens, count, HEAD_DIM, device=device.torch_name).to(kind).transpose(0, 1).unsqueeze(0)

    q, k, v = heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)
    seconds = _median(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True), clock)
    return attention_costs.attention_prefill(1, tokens, HEADS, KV_HEADS, HEAD_DIM).flops / seconds


def _decode_rate(context: int, device: Device, kind: torch.dtype, clock: Clock) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q = torch.randn(BATCH, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, device=device.torch_name).to(kind)
    k, v = (
        torch.randn(BATCH, context, KV_HEADS, HEAD_DIM, device=device.torch_name).to(kind).transpose(1, 2)
        for _ in range(2)
    )
    mask = torch.ones(BATCH, 1, 1, context, dtype=torch.bool, device=device.torch_name)
    seconds = _median(lambda: sdpa(q, k, v, attn_mask=mask), clock)
    return attention_costs.attention_decode(BATCH, context, HEADS, KV_HEADS, HEAD_DIM, kind.itemsize).bytes / seconds


def _elementwise_rates(
    device: Device, kind: torch.dtype, clock: Clock, product: Product
) -> dict[str, dict[int, float]]:
    """See `Calibration.elementwise`."""
    found: dict[str, dict[int, float]] = {name: {} for name in KINDS}
    for rows, width in ELEMENTWISE:
        for name, (moved, seconds) in _elementwise(rows, width, device, kind, clock, product).items():
            found[name][round(moved)] = moved / seconds
    return found


def _elementwise(
    rows: int, width: int, device: Device, kind: torch.dtype, clock: Clock, product: Product
) -> dict[str, tuple[float, float]]:
    """Bytes and seconds of each of KINDS, behind a product that wrote the input and whose own time is taken off."""
    import torch
    from torch.nn import functional as F

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device.torch_name).to(kind)

    heads, half, size = width // HEAD_DIM, HEAD_DIM // 2, kind.itemsize
    x, residual, scale, up = make(rows, width), make(rows, width), make(width), make(rows, width)
    cos, sin, cache = make(rows, 1, half), make(rows, 1, half), make(2 * rows, heads, HEAD_DIM)
    places = torch.arange(rows, device=device.torch_name)
    weight = _weights((width, width), 1, device, kind, product)[0][1]

    def norm(y: Tensor) -> Tensor:
        return F.rms_norm(y + residual, (width,), scale, 1e-5)

    def rope(y: Tensor) -> Tensor:
        first, second = y.view(rows, heads, HEAD_DIM).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def write(y: Tensor) -> Tensor:
        y = y.view(rows, heads, HEAD_DIM)
        cache.index_put_((places,), y)
        return cache.index_put_((places + rows,), y)

    timed: dict[str, tuple[costs.Work, Callable[[Tensor], Tensor]]] = {
        "norm": (costs.norm(rows, width, size, residual=True), norm),
        "rope": (costs.rope(rows, heads, 0, HEAD_DIM, size), rope),
        "kv": (costs.kv_write(rows, heads, HEAD_DIM, size), write),
        "elementwise": (costs.silu_mul(rows, width, size), lambda y: F.silu(y) * up),
    }
    return {name: (work.bytes, _behind(lambda: product(x, weight), fn, clock)) for name, (work, fn) in timed.items()}


def _behind(first: Callable[[], Tensor], then: Callable[[Tensor], Tensor], clock: Clock) -> float:
    """Seconds that `then` adds to `first`: medians of both in turns; at least a tenth of the whole."""
    alone: list[float] = []
    both: list[float] = []
    clock(lambda: then(first()))
    while sum(both) < SECONDS and len(both) < 10_000:
        alone.append(clock(first))
        both.append(clock(lambda: then(first())))
    whole = statistics.median(both)
    return max(whole - statistics.median(alone), whole / 10)


def _median(fn: Callable[[], object], clock: Clock) -> float:
    """Median seconds over SECONDS of repetitions, at least three, after one to warm up."""
    clock(fn)
    taken = [clock(fn) for _ in range(3)]
    while sum(taken) < SECONDS and len(taken) < 10_000:
        taken.append(clock(fn))
    return statistics.median(taken)


def _read() -> dict[str, Calibration]:
    try:
        entries = json.loads(cache_path().with_name("calibration.json").read_text(encoding="utf-8"))
        return {key: _restored(entry) for key, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _restored(entry: dict[str, Any]) -> Calibration:
    """JSON has text for keys: sizes become numbers again. Raises where a rate is not a positive number."""

    def sized(table: dict[str, float]) -> dict[int, float]:
        return {int(size): float(rate) for size, rate in table.items()}

    tables: dict[str, Any] = {name: sized(entry[name]) for name in ("from_memory", "prefill", "decode")}
    for name in ("from_cache", "elementwise"):
        tables[name] = {key: sized(table) for key, table in entry[name].items()}
    tables["from_cache"] = {int(numbers): table for numbers, table in tables["from_cache"].items()}
    found = Calibration(**{**entry, **tables})
    nested = (*found.from_cache.values(), *found.elementwise.values())
    measured = [table.values() for table in (found.from_memory, found.prefill, found.decode, *nested)]
    rates = [found.bandwidth, *(rate for table in measured for rate in table)]
    if not (all(measured) and nested and set(found.elementwise) == set(KINDS) and min(rates) > 0):
        raise ValueError("a rate is missing or not positive")
    return found


def _write(entries: dict[str, Calibration]) -> None:
    try:
        text = json.dumps({key: asdict(entry) for key, entry in entries.items()}, indent=2, sort_keys=True)
        write_atomically(cache_path().with_name("calibration.json"), text + "\n")
    except OSError:
        return  # a read-only home is no reason to fail: the next run measures again
