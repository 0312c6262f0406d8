"""Why is decoding slow, and what would help? Evidence in, verdict out: arithmetic on measured figures, no measuring.

A decode step cannot be faster than its floors: the time of reading weights and cache at the memory's rate, and the time
of its arithmetic at the processor's. What the CPU spends on calling operators comes on top. The largest of the three
is the bound, unless tokens went through the model more often than needed: then nothing else matters yet.

The gains are predictions of the same model, each for one change alone: the step with another floor or fewer calls,
while operators keep the share of the peak that they reach now. So they are "up to": a real change also adds something
(unpacking 4-bit weights takes arithmetic), and two changes do not multiply when they remove the same milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

RECOMPUTATION = "recomputation"
MEMORY = "memory bandwidth"
ARITHMETIC = "arithmetic"
CALLS = "operator-call overhead"

WASTE = 1.25  # tokens computed over tokens needed, above which recomputation is the fault
WORTH = 1.03  # a gain below this is noise
PACKED_BITS = 4.5  # 4-bit weights with a 16-bit scale for each group of 32
SHARED = 8  # sequences that the batching advice proposes, or twice what there is


@dataclass(frozen=True)
class Evidence:
    """What was measured. Times in seconds, sizes in bytes, rates in bytes/s and FLOP/s.

    Attributes:
        subject: the run in words, for the first sentence.
        on_gpu: whether operators run apart from the CPU that calls them.
        runner: "eager", "compile" or "cuda-graph".
        needed, computed: tokens that had to go through the model, and those that did.
        generated: tokens that came out.
        sequences: that share one decode pass, on average.
        rows: tokens of one decode pass: `sequences`, or more when tokens are computed again.
        step: wall time of a decode pass, no profiler running.
        busy: share of a pass inside operators (CPU) or with a kernel running (GPU), 0..1.
        calls, call_seconds: operator calls of a pass, and what calling a tiny one costs.
        forward: share of a pass inside the model's forward, 0..1; the rest is scheduling, batching, sampling, text.
        weight_bytes, weight_bits: weights that a pass reads, and the bits of each.
        kv_bytes: cache that a pass reads, all of its sequences together.
        flops_per_token: arithmetic of one token.
        bandwidth, flops: the measured peaks for this dtype.
        half_flops: the peak of 16-bit arithmetic, 0 when there is none.
        cache_bytes: last-level cache of a CPU, 0 where unknown.
        threads, cores: used and usable on a CPU; 0 on a GPU.
    """

    subject: str
    on_gpu: bool
    runner: str
    needed: int
    computed: int
    generated: int
    sequences: float
    rows: float
    step: float
    busy: float
    calls: float
    call_seconds: float
    forward: float
    weight_bytes: float
    weight_bits: float
    kv_bytes: float
    flops_per_token: float
    bandwidth: float
    flops: float
    half_flops: float = 0.0
    cache_bytes: float = 0.0
    threads: int = 0
    cores: int = 0

    @property
    def waste(self) -> float:
        """Tokens computed over tokens needed; 1 is perfect."""
        return self.computed / self.needed


@dataclass(frozen=True)
class Parts:
    """Where a decode pass's time goes, in seconds.

    Attributes:
        memory, arithmetic: the two floors; they overlap, so only the larger one counts.
        calls: calling operators in the model's forward.
        outside: everything outside of the forward that is not hidden behind a floor.
        slower: the rest: operators that take longer than the floors.
    """

    memory: float
    arithmetic: float
    calls: float
    outside: float
    slower: float

    @property
    def floor(self) -> float:
        """What the machine's peaks allow at best."""
        return max(self.memory, self.arithmetic)

    @property
    def overhead(self) -> float:
        """Time of the CPU's, in and outside of the forward."""
        return self.calls + self.outside


@dataclass(frozen=True)
class Advice:
    """One thing to try: what, why with its figures, and up to how many times the tokens per second."""

    what: str
    why: str
    gain: float


@dataclass(frozen=True)
class Verdict:
    """What bounds the run, how it shows, and at most three things to try, the best first."""

    bound: str
    headline: str
    findings: tuple[str, ...]
    advices: tuple[Advice, ...]


def floors(
    e: Evidence, *, rows: float, weight_bytes: float, kv_bytes: float, flops: float | None = None
) -> tuple[float, float]:
    """Seconds that reading and that arithmetic take at least, for a pass of so many tokens and bytes."""
    return (weight_bytes + kv_bytes) / e.bandwidth, rows * e.flops_per_token / (flops or e.flops)


def parts(e: Evidence) -> Parts:
    """Split a measured pass.

    A GPU computes while the CPU calls: overhead is the time without a kernel. A CPU does both in turns: overhead is the
    time outside of operators, and inside of each operator the part that even an empty one would take.
    """
    memory, arithmetic = floors(e, rows=e.rows, weight_bytes=e.weight_bytes, kv_bytes=e.kv_bytes)
    room = max(0.0, e.step - max(memory, arithmetic))
    idle = (1 - e.busy) * e.step
    overhead = min(room, idle if e.on_gpu else idle + e.calls * e.call_seconds)
    outside = min(overhead, (1 - e.forward) * e.step)
    return Parts(memory, arithmetic, overhead - outside, outside, room - overhead)


def diagnose(e: Evidence) -> Verdict:
    """The verdict on a run."""
    p = parts(e)
    if e.waste >= WASTE:
        bound = RECOMPUTATION
    else:
        bound = max((MEMORY, p.memory), (ARITHMETIC, p.arithmetic), (CALLS, p.overhead), key=lambda pair: pair[1])[0]
    first = REMEDIES[bound]
    found = [advice for advice in _advices(e, p) if advice.gain >= WORTH]
    found.sort(key=lambda advice: (not advice.what.startswith(first), -advice.gain))
    return Verdict(bound, _headline(e, p, bound), tuple(_findings(e, p)), tuple(found[:3]))


REMEDIES = {  # how the advice begins that answers the bound itself; it comes first, whatever else would gain more
    RECOMPUTATION: "keep a KV cache",
    MEMORY: "smaller weights",
    ARITHMETIC: "16-bit",
    CALLS: "fewer calls",
}


def _headline(e: Evidence, p: Parts, bound: str) -> str:
    if bound == RECOMPUTATION:
        return (
            f"bound by recomputation: there is no KV cache. {e.computed:,} tokens went through the model, {e.needed:,} "
            f"were needed: {e.waste:.1f} for each."
        )
    if bound == MEMORY:
        return (
            f"bound by memory bandwidth: reading {_bytes(e.weight_bytes + e.kv_bytes)} takes {_ms(p.memory)} of the "
            f"{_ms(e.step)} of a step, {_percent(p.memory / e.step)} of the {e.bandwidth / 1e9:.1f} GB/s measured here."
        )
    if bound == ARITHMETIC:
        return (
            f"bound by arithmetic: {e.rows * e.flops_per_token / 1e9:.2f} GFLOP take {_ms(p.arithmetic)} of the "
            f"{_ms(e.step)} of a step, {_percent(p.arithmetic / e.step)} of the {e.flops / 1e9:,.0f} GFLOP/s measured "
            "here."
        )
    return (
        f"bound by operator-call overhead (Python and dispatch): it costs {_ms(p.overhead)} of the {_ms(e.step)} of a "
        f"step; reading weights and cache would take {_ms(p.memory)}."
    )


def _findings(e: Evidence, p: Parts) -> Iterator[str]:
    yield (
        f"{e.computed / e.generated:.3g} tokens computed per token generated, {e.needed / e.generated:.3g} needed; "
        f"{e.sequences:.3g} sequence{'s' * (e.sequences > 1)} in a pass."
    )
    yield (
        f"{e.calls:,.0f} operator calls a step, {e.call_seconds * 1e6:.1f} µs for an empty one: "
        f"{_ms(e.calls * e.call_seconds)}. {'The GPU' if e.on_gpu else 'A step'} is busy "
        f"{'' if e.on_gpu else 'inside operators '}{_percent(e.busy)} of the time."
    )
    yield (
        f"Of {_ms(e.step)}: at least {_ms(p.floor)} reading or computing, {_ms(p.calls)} calling operators, "
        f"{_ms(p.outside)} outside of the model, {_ms(p.slower)} in operators beyond what the peaks allow."
    )
    yield (
        f"Memory floor {_percent(p.memory / e.step)} of the step, arithmetic floor {_percent(p.arithmetic / e.step)}; "
        f"each token reads {_bytes(e.weight_bytes / e.sequences)} of weights."
    )
    if 0 < e.weight_bytes + e.kv_bytes < e.cache_bytes:
        yield f"Weights and cache fit into the CPU's {_bytes(e.cache_bytes)}: they may be read faster than memory."
    if 0 < e.threads < e.cores:
        yield f"It uses {e.threads} of {e.cores} cores; the peaks are those of all."


def _advices(e: Evidence, p: Parts) -> Iterator[Advice]:
    """Everything that the cost model has an opinion on; the caller drops what gains nothing."""

    def gain(floor: float, overhead: float = p.overhead, *, times: float = 1) -> float:
        slower = p.slower * floor / p.floor
        return times * e.step / (floor + slower + overhead)

    if e.waste >= WASTE:
        kept = max(floors(e, rows=e.sequences, weight_bytes=e.weight_bytes, kv_bytes=e.kv_bytes))
        kept += min(p.overhead, e.calls * e.call_seconds)
        yield Advice(
            "keep a KV cache",
            f"{e.computed:,} tokens computed for {e.needed:,} needed, {e.waste:.1f}x fewer with one; reading the "
            f"weights and calling as many operators still take {_ms(kept)} of {_ms(e.step)}",
            min(e.waste, e.step / kept),
        )
    if e.runner == "eager" and p.calls:
        how = "runner cuda-graph: one launch a step" if e.on_gpu else "runner compile: a few fused functions"
        yield Advice(
            f"fewer calls ({how})",
            f"calls cost {_ms(p.calls)} of {_ms(e.step)}",
            gain(p.floor, p.outside),
        )
    more = max(SHARED, 2 * e.sequences) / e.sequences
    many = max(floors(e, rows=e.rows * more, weight_bytes=e.weight_bytes, kv_bytes=e.kv_bytes * more))
    yield Advice(
        f"batch {e.sequences * more:.0f}",
        f"the weights are read once, and operators called once, for {e.sequences * more:.0f} sequences instead of "
        f"{e.sequences:.3g}: tokens/s of all together",
        gain(many, times=more),
    )
    if e.weight_bits > 8:
        packed = e.weight_bytes * PACKED_BITS / e.weight_bits
        yield Advice(
            "smaller weights (4-bit)",
            f"{_bytes(packed)} to read instead of {_bytes(e.weight_bytes)}",
            gain(max(floors(e, rows=e.rows, weight_bytes=packed, kv_bytes=e.kv_bytes))),
        )
    if e.weight_bits == 32 and e.half_flops:
        half = floors(e, rows=e.rows, weight_bytes=e.weight_bytes / 2, kv_bytes=e.kv_bytes / 2, flops=e.half_flops)
        yield Advice(
            "16-bit weights and arithmetic",
            f"half of the bytes, and {e.half_flops / 1e9:,.0f} instead of {e.flops / 1e9:,.0f} GFLOP/s",
            gain(max(half)),
        )
    if e.waste < WASTE:
        yield Advice(
            "8-bit KV cache",
            f"{_bytes(e.kv_bytes / 2)} to read instead of {_bytes(e.kv_bytes)}",
            gain(max(floors(e, rows=e.rows, weight_bytes=e.weight_bytes, kv_bytes=e.kv_bytes / 2))),
        )
    yield Advice(
        "hide what is outside of the model",
        f"scheduling, batch building, sampling and text take {_ms(p.outside)} of {_ms(e.step)}: prepare the next step "
        "while this one runs",
        gain(p.floor, p.calls),
    )
    if 0 < e.threads < e.cores:
        share = e.threads / e.cores
        yield Advice(
            f"all {e.cores} cores",
            f"{e.threads} in use: OMP_NUM_THREADS={e.cores}",
            e.step / (p.overhead + max(p.floor, (e.step - p.overhead) * share)),
        )
    yield Advice(
        "faster operators",
        f"they take {_ms(p.slower)} more than the peaks allow: `titan trace` names the slowest",
        e.step / (p.floor + p.overhead),
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
