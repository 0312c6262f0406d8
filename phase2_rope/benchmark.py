"""Phase 2 against its framework, phase 1 and its peers: `python -m phase2_rope.benchmark [case ...]`.

    bytes_a_token  what a token leaves in one layer of the cache: latents, grouped heads, all heads
    forms          both forms of latent attention by new tokens and length, and where their times cross
    mla_engine     decode of a dense model with DeepSeek-V2-Lite's attention: framework, solution, transformers
    decode         a decode step of the 1.1B shape beside phase 1, whose layers turn q and k the old way
    rope_cpu       the turn on a CPU: ours, phase 0's, transformers', torch.compile
    counts         what each version of rope.cu moves, counted in the emulation (needs a C++ compiler, no GPU)
    static         registers, spills, shared memory and occupancy of all kernels (needs NVRTC or nvcc, no GPU)
    tiles          what fits an SM: decode tiles of grouped heads and of latents, compiled (no GPU)
    rope           the kernels beside vLLM, FlashInfer, Liger, eager and torch.compile (needs a GPU)
    check_rope, check_engine
                   what must be right on a GPU before it is timed (need a GPU)

Every case times its subjects in turns (A B A B), several rounds, in one process, and writes
reports/results/phase2/<case>.json. The ratios are medians of ratios within a round. `--dry-run` goes through the GPU
cases with tiny sizes on the CPU.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from module0_profiling import rooms
from module0_profiling.bench import Case, Options, Suite, figure, main, ratio
from module0_profiling.bench_gpu import GpuCase
from module0_profiling.results import Figure
from phase0_prototype import workloads
from phase0_prototype.hub import resolve_model
from phase0_prototype.workloads import SHAPE, TINY, in_turns, random_prompts
from phase1_memory.llm import LLM as PagedLLM
from phase2_rope import count_cases, kernel_cases, mla_cases, rope_cpu_cases
from phase2_rope.llm import LLM


def decode(options: Options) -> tuple[Figure, ...]:
    """A decode step and a prompt of the 1.1B shape in bfloat16, with phase 1's layers and with this phase's."""
    figures: list[Figure] = []
    longest = options.size(512, 64)
    settings: dict[str, Any] = {"dtype": "bfloat16", "device": options.device, "max_model_len": longest}
    cases = [(1, 8, 2)] if options.dry else [(1, 128, 24), (8, 128, 16)]
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        engines = {
            name: kind(str(directory), num_blocks=8 * -(-longest // 16), max_num_seqs=8, **settings)
            for name, kind in (("phase 1", PagedLLM), ("phase 2", LLM))
        }
    for batch, length, new in cases:
        prompts = random_prompts(engines["phase 1"].engine.config.vocab_size, [length] * batch)
        subjects = {name: partial(workloads.run_ours, llm, prompts, new) for name, llm in engines.items()}
        runs = in_turns(subjects, options.rounds, options.console)
        row = f"batch {batch}, {length} tokens"
        steps = {name: [run.per_step for run in done] for name, done in runs.items()}
        prefill = {name: [run.prefill for run in done] for name, done in runs.items()}
        for name, values in steps.items():
            figures.append(figure(f"{row}/{name}", [batch / s for s in values], "tokens/s"))
        figures.append(ratio(f"{row}/over phase 1", steps["phase 1"], steps["phase 2"]))
        figures.append(ratio(f"{row}/prompt over phase 1", prefill["phase 1"], prefill["phase 2"]))
    return tuple(figures)


CASES: dict[str, Case] = {
    "bytes_a_token": mla_cases.bytes_a_token,
    "forms": mla_cases.forms,
    "mla_engine": mla_cases.engine,
    "decode": decode,
    "rope_cpu": rope_cpu_cases.cpu,
    "counts": count_cases.counted,
    "static": lambda options: kernel_cases.static(),
    "tiles": lambda options: _tiles().tiles(options),
    "rope": lambda options: kernel_cases.timed(options.device, max(options.rounds, 5), dry=options.dry),
    "check_rope": lambda options: _checks().check(options.device, dry=options.dry),
    "check_engine": lambda options: _engine_checks().engine(options.device, dry=options.dry),
}
NEEDS_GPU = ("rope", "check_rope", "check_engine")
GPU_CHECKS = (GpuCase("check_rope", value=10, seconds=90), GpuCase("check_engine", value=9, seconds=60))
GPU_CASES = (
    GpuCase("rope", value=10, seconds=150, check="check_rope"),
    GpuCase("forms", value=7, seconds=40),
    GpuCase("mla_engine", value=7, seconds=90, check="check_engine"),
    GpuCase("decode", value=7, seconds=60, check="check_engine"),
)


def _checks() -> ModuleType:
    from phase2_rope import gpu_checks

    return gpu_checks


def _engine_checks() -> ModuleType:
    from phase2_rope import engine_checks

    return engine_checks


def _tiles() -> ModuleType:
    from phase2_rope import decode_tile_cases

    return decode_tile_cases


SUITE = Suite(
    room=__package__ or "phase2_rope",
    cases=CASES,
    needs_gpu=NEEDS_GPU,
    gpu=[case.name for case in (*GPU_CHECKS, *GPU_CASES)],
    peers={
        "mla_engine": ("transformers",),
        "rope_cpu": ("transformers",),
        "rope": ("vllm", "flashinfer-python", "liger-kernel", "transformers"),
    },
    checkpoint=rooms.ROOT / "build" / SHAPE,
    tiny=lambda: resolve_model(TINY),  # it stands for the 1.1B shape too
)

if __name__ == "__main__":
    main(SUITE, __doc__)
