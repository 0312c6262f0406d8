"""How long a step of a model takes on a machine, and what fits: before anything runs.

    seconds = sum over operations of max(flops / rate, bytes / bandwidth), + overhead of the engine

On a datasheet or under measured peaks that is a floor; on a calibrated machine (`calibration.py`) the rates are those
that an engine's operations reach there, by kind and size, and it is an expectation. On a CPU overhead adds up with the
work; on a GPU the host runs ahead, and the larger of the two counts.

Not in the model: gaps between kernels of a captured step, overlap of communication with work, prefill and decode
sharing a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from module0_profiling import model_costs
from module0_profiling.calibration import Calibration, rate_at
from module0_profiling.engine_overhead import Overhead
from module0_profiling.hardware import Peaks
from module0_profiling.model_costs import Formats, Operation
from module0_profiling.model_shape import ModelError, ModelShape, shard

PLAIN, NO_OVERHEAD = Formats(), Overhead()
USABLE = 0.9  # share of a device's memory for weights and cache: activations, the context and the library take the rest


class Machine(Protocol):
    """What says how long an operation takes."""

    @property
    def source(self) -> str:
        """Where the figures come from, for titles."""
        ...

    def seconds(self, operation: Operation) -> tuple[float, str]:
        """Seconds of all the times that it runs, and what bounds it: "memory", "compute" or "link"."""
        ...


@dataclass(frozen=True)
class Roofs:
    """Ceilings of a datasheet or of `titan peaks`; `efficiency` is the share of them that is reached."""

    peaks: Peaks
    efficiency: float = 1.0
    link: float | None = None

    @property
    def source(self) -> str:
        """For titles."""
        share = "" if self.efficiency == 1 else f" x {self.efficiency:g}"
        return f"{self.peaks.source} peaks{share}"

    def seconds(self, operation: Operation) -> tuple[float, str]:
        """See `Machine`. Elementwise operations are bound by memory wherever they are bound."""
        if operation.comm is not None:
            return _on_link(operation, self.link)
        work, rates = operation.total, self.peaks.matmul
        memory, compute = work.bytes / self.peaks.read_bandwidth, 0.0
        if operation.kind in ("linear", "attention"):
            if operation.rate not in rates:
                known = ", ".join(rates) or "no dtype"
                raise ModelError(
                    f"{self.peaks.fingerprint} has no published or measured {operation.rate} rate, only for {known}: "
                    "choose another --dtype or --weights, or give --tflops"
                )
            compute = work.flops / rates[operation.rate]
        return max(memory, compute) / self.efficiency, "memory" if memory >= compute else "compute"


@dataclass(frozen=True)
class Measured:
    """A calibrated machine.

    Attributes:
        calibration: its rates.
        ridge: FLOP/byte from which a linear layer counts as bound by compute, in the label only.
        cached: the weights stay in the last cache from one step to the next.
        widened: weights are stored in another format than was calibrated, and widened to its dtype on the way.
    """

    calibration: Calibration
    ridge: float
    cached: bool = False
    widened: bool = False
    link: float | None = None

    @property
    def source(self) -> str:
        """For titles."""
        return f"calibrated here ({self.calibration.method}, {self.calibration.threads} threads)"

    def seconds(self, operation: Operation) -> tuple[float, str]:
        """See `Machine`."""
        rates, work = self.calibration, operation.total
        if operation.comm is not None:
            return _on_link(operation, self.link)
        if operation.kind in rates.elementwise:
            return work.bytes / rate_at(rates.elementwise[operation.kind], operation.work.bytes), "memory"
        if operation.kind == "attention":
            if operation.rows == 1:
                return work.bytes / rate_at(rates.decode, operation.positions), "memory"
            return work.flops / rate_at(rates.prefill, operation.rows), "compute"
        if self.cached or self.widened:
            numbers = operation.work.flops / (2 * operation.rows)
            rate = rate_at({n: rate_at(table, operation.rows) for n, table in rates.from_cache.items()}, numbers)
        else:
            rate = rate_at(rates.from_memory, operation.rows)
        seconds = work.flops / rate
        if not self.cached:
            seconds = max(seconds, work.bytes / rates.bandwidth)
        return seconds, "memory" if work.intensity < self.ridge else "compute"


@dataclass(frozen=True)
class Prediction:
    """One step.

    Attributes:
        batch, tokens, context: sequences, new tokens of each, positions of each afterwards.
        parts: operation, its seconds, its bound.
        overhead: seconds beside the operations.
        seconds: of the step.
        kv: bytes of the cache on one device.
        weights: bytes of the weights on one device.
    """

    batch: int
    tokens: int
    context: int
    parts: tuple[tuple[Operation, float, str], ...]
    overhead: float
    seconds: float
    kv: float
    weights: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch * self.tokens / self.seconds

    @property
    def bound_by(self) -> str:
        """What most of the step's time goes to: "memory", "compute", "link" or "overhead"."""
        shares = {"overhead": self.overhead}
        for _, seconds, bound in self.parts:
            shares[bound] = shares.get(bound, 0.0) + seconds
        return max(shares, key=shares.__getitem__)

    def fits(self, memory: float | None) -> bool | None:
        """Whether weights and cache fit into the usable part of so many bytes; None where they are unknown."""
        return None if memory is None else self.weights + self.kv <= USABLE * memory


def predict(
    shape: ModelShape,
    machine: Machine,
    batch: int,
    context: int,
    *,
    tokens: int = 1,
    formats: Formats = PLAIN,
    ranks: int = 1,
    engine: Overhead = NO_OVERHEAD,
    overlap: bool = False,
) -> Prediction:
    """Predict a step.

    Args:
        shape: the whole model; it is divided by `ranks`.
        machine: of one device.
        batch: sequences.
        context: positions of each after the step; the new `tokens` are the last of them.
        tokens: 1 for a decode step; all of the context for a prefill; fewer for a chunk.
        formats: of numbers.
        ranks: tensor-parallel devices.
        engine: its overhead.
        overlap: overhead hides behind work (a GPU), so that the larger counts.

    Raises:
        ModelError: the machine has no rate for a dtype or no link, or the model cannot be divided.
    """
    local = shard(shape, ranks)
    operations = model_costs.step(local, batch, tokens, context - tokens, formats, ranks=ranks)
    if tokens > 1:  # as this engine does it
        one = model_costs.step(local, batch, 1, context - 1, formats)
        operations = model_costs.last_rows_only(operations, one, local)
    parts = tuple((operation, *machine.seconds(operation)) for operation in operations)
    overhead, work = engine.of(shape.layers, batch), sum(seconds for _, seconds, _ in parts)
    return Prediction(
        batch=batch,
        tokens=tokens,
        context=context,
        parts=parts,
        overhead=overhead,
        seconds=max(work, overhead) if overlap else work + overhead,
        kv=batch * model_costs.kv_bytes(local, context, formats),
        weights=model_costs.weight_bytes(local, formats),
    )


def largest_batch(shape: ModelShape, memory: float, context: int, formats: Formats = PLAIN, *, ranks: int = 1) -> int:
    """The most sequences of `context` positions whose cache fits beside the weights; 0 when the weights do not fit."""
    local = shard(shape, ranks)
    free = USABLE * memory - model_costs.weight_bytes(local, formats)
    return max(0, int(free // model_costs.kv_bytes(local, context, formats)))


def parse_numbers(text: str, option: str) -> Sequence[int]:
    """ "1,8,32" or "1..256" (doubling; the end is included) as numbers. Raises ModelError that names the option."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not first.isdigit() or (dots and not last.isdigit()) or int(first) < 1 or (dots and int(last) < int(first)):
            raise ModelError(f"{option} {text}: use whole numbers from 1 as in 1,8,32 or a doubling range as in 1..256")
        number, end = int(first), int(last or first)
        while number < end:
            found.append(number)
            number *= 2
        found.append(end)
    return list(dict.fromkeys(found))


def _on_link(operation: Operation, link: float | None) -> tuple[float, str]:
    assert operation.comm is not None
    if not link:
        raise ModelError("--tp needs a link between devices, and none is known for this one: give --link-gb-s")
    return operation.times * operation.comm.seconds(link), "link"
