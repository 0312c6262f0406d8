"""Phase 1 against its framework, phase 0 and `transformers`: `python -m phase1_memory.benchmark [case ...]`.

    decode       1.1B shape in bfloat16, batches and contexts: cache in one piece (phase 0), in blocks, and transformers
    same_memory  48 requests in memory that holds four sequences of full length: phase 0 and phase 1
    sharing      eight continuations of one prompt: computed eight times, and once
    pressure     what running out of blocks costs: recompute, swap to memory, swap to a file
    beams        beam search of width 4 beside transformers
    allocator    a step of 1000 growing requests: Rust, Python, a free list; and how many pieces a request is in
    runs         what pieces cost: gathering and copying out a request that lies in one run, in eight, in single blocks
    offload      the tiers alone, checksums, and how much of a copy hides behind arithmetic
    simulator    policies on traces: batch, kinds of waste, time of the policy; draws the figures of the report
    simulated_pressure
                 reject, recompute and swap, simulated

Every case times its subjects in turns (A B A B), several rounds, in one process, and writes
reports/results/phase1/<case>.json. The ratios are medians of ratios within a round. `--dry-run` goes through the GPU
cases with tiny sizes on the CPU.
"""

from __future__ import annotations

from module0_profiling import rooms
from module0_profiling.bench import Case, Options, Suite, main
from module0_profiling.bench_gpu import GpuCase
from module0_profiling.results import Figure
from phase0_prototype.hub import resolve_model
from phase0_prototype.workloads import SHAPE, TINY
from phase1_memory import allocator_cases, engine_cases, offload_cases, simulator_cases


def offload(options: Options) -> tuple[Figure, ...]:
    """The tiers of offload.py."""
    sizes = offload_cases.DRY if options.dry else offload_cases.FULL
    return (
        *offload_cases.tiers(options.device, options.rounds, options.console, sizes),
        *offload_cases.checksums(options.rounds, sizes),
        *offload_cases.overlap(options.device, options.rounds, options.console, sizes),
    )


def simulator(options: Options) -> tuple[Figure, ...]:
    """All policies on all traces, with pictures."""
    sizes = simulator_cases.DRY if options.dry else simulator_cases.FULL
    if not options.dry:
        folder = rooms.ROOT / "reports" / "figures"
        with options.console.status("drawing"):
            simulator_cases.draw(simulator_cases.growing(sizes=sizes), folder / "phase1-growing.png")
            simulator_cases.draw(simulator_cases.sharegpt(sizes=sizes), folder / "phase1-sharegpt.png")
    return simulator_cases.simulator(options.console, sizes)


def simulated_pressure(options: Options) -> tuple[Figure, ...]:
    """What running out of memory does to pages."""
    return simulator_cases.pressure(options.console, simulator_cases.DRY if options.dry else simulator_cases.FULL)


CASES: dict[str, Case] = {
    "decode": engine_cases.decode,
    "same_memory": engine_cases.same_memory,
    "sharing": engine_cases.sharing,
    "pressure": engine_cases.pressure,
    "beams": engine_cases.beams,
    "allocator": allocator_cases.allocator,
    "runs": allocator_cases.runs,
    "offload": offload,
    "simulator": simulator,
    "simulated_pressure": simulated_pressure,
}

GPU_CASES = (
    GpuCase("decode", value=8, seconds=120),
    GpuCase("runs", value=8, seconds=40),
    GpuCase("offload", value=7, seconds=60),
    GpuCase("pressure", value=6, seconds=60),
    GpuCase("same_memory", value=6, seconds=40),
    GpuCase("sharing", value=4, seconds=30),
    GpuCase("beams", value=3, seconds=40),
)
SUITE = Suite(
    room=__package__ or "phase1_memory",
    cases=CASES,
    needs_gpu=(),
    gpu=[case.name for case in GPU_CASES],
    peers={"decode": ("transformers",), "beams": ("transformers",)},
    checkpoint=rooms.ROOT / "build" / SHAPE,
    tiny=lambda: resolve_model(TINY),  # it stands for the 1.1B shape too
)

if __name__ == "__main__":
    main(SUITE, __doc__)
