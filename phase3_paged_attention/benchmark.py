"""Phase 3 against its framework, phase 2 and its peers: `python -m phase3_paged_attention.benchmark [case ...]`.

    cpu_decode      torch's path: a decode on pages over one on contiguous caches
    kv_quality      perplexity on held-out text with each format of the cache
    ladder_bytes    what each rung of the decode ladder asks of memory, traced and by the model
    ladder_static   registers, shared memory, copies in the background of each rung (no GPU)
    latent_tiles    the same of the tiles of the kernel for latents, bytes and FLOPs of a cached token (no GPU)
    static          registers, spills, shared memory and occupancy of all kernels, six architectures (no GPU)
    decode          a decode step of the 1.1B shape beside phase 2, whose attention gathers the pages
    paged_decode    64 sequences of 8,192 tokens, and other batches, lengths and heads, beside FlashInfer and vLLM
    paged_kinds     the same decode beside PyTorch, by rungs of the ladder, in FP8, with other pages, ragged
    paged_prefill   prompts of 1k to 32k tokens, and a chunk of 512, beside FlashInfer, SDPA and vLLM
    latent_decode   latents by heads, batch and format, beside FlashInfer
    paged_tree      64 nodes of a tree beside 64 causal tokens and FlashInfer's masks
    tune            tiles of the paged kernel: the best on this GPU
    check_attention, check_kernels, check_engine
                    what must be right on a GPU before it is timed

Those from paged_decode on need a GPU. Every case times its subjects in turns (A B A B), several rounds, in one process,
and writes reports/results/phase3/<case>.json. The ratios are medians of ratios within a round. `--dry-run` goes through
the GPU cases with tiny sizes on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from module0_profiling import rooms
from module0_profiling.bench import Case, Options, Suite, figure, main, ratio
from module0_profiling.bench_gpu import GpuCase
from module0_profiling.results import Figure
from phase0_prototype import workloads
from phase0_prototype.hub import resolve_model
from phase0_prototype.workloads import SHAPE, TINY, in_turns, random_prompts

ROOM = __package__ or "phase3_paged_attention"


def lazily(module: str, function: str) -> Case:
    """A case of another module, which is imported when the case runs."""

    def case(options: Options) -> tuple[Figure, ...]:
        found: Case = getattr(importlib.import_module(f"{ROOM}.measures.{module}"), function)
        return found(options)

    return case


def on_device(module: str, function: str) -> Case:
    """A check, which is told the device and whether the run is dry."""

    def case(options: Options) -> tuple[Figure, ...]:
        check: Any = getattr(importlib.import_module(f"{ROOM}.measures.{module}"), function)
        figures: tuple[Figure, ...] = check(options.device, dry=options.dry)
        return figures

    return case


def decode(options: Options) -> tuple[Figure, ...]:
    """A decode step and a prompt of the 1.1B shape in bfloat16, with phase 2's attention and with this phase's."""
    from phase2_rope.llm import LLM as RopeLLM
    from phase3_paged_attention.llm import LLM

    cases = [(1, 128, 24), (8, 128, 16)]  # batch, tokens of a prompt, new tokens
    if options.device.startswith("cuda"):
        cases = [(batch, length, 64) for length in (128, 1024) for batch in (1, 8, 32)]
    if options.dry:
        cases = [(1, 8, 2)]
    longest = max(length + new for _, length, new in cases)
    batch = max(batch for batch, _, _ in cases)
    settings: dict[str, Any] = {"dtype": "bfloat16", "device": options.device, "max_model_len": longest}
    settings |= {"num_blocks": batch * -(-longest // 16) + batch, "max_num_seqs": batch}
    figures: list[Figure] = []
    kinds: dict[str, Callable[..., Any]] = {
        "phase 2": RopeLLM,
        "phase 3": partial(LLM, attention_backend="torch" if options.dry else "auto"),
    }
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        engines = {name: kind(str(directory), **settings) for name, kind in kinds.items()}
    for batch, length, new in cases:
        prompts = random_prompts(engines["phase 2"].engine.config.vocab_size, [length] * batch)
        subjects = {name: partial(workloads.run_ours, llm, prompts, new) for name, llm in engines.items()}
        runs = in_turns(subjects, options.rounds, options.console)
        row = f"batch {batch}, {length} tokens"
        steps = {name: [run.per_step for run in done] for name, done in runs.items()}
        prefill = {name: [run.prefill for run in done] for name, done in runs.items()}
        for name, values in steps.items():
            figures.append(figure(f"{row}/{name}", [batch / s for s in values], "tokens/s"))
        figures.append(ratio(f"{row}/over phase 2", steps["phase 2"], steps["phase 3"]))
        figures.append(ratio(f"{row}/prompt over phase 2", prefill["phase 2"], prefill["phase 3"]))
    return tuple(figures)


CASES: dict[str, Case] = {
    "cpu_decode": lazily("cpu_cases", "cpu_decode"),
    "kv_quality": lazily("kv_quality", "quality"),
    "ladder_bytes": lazily("ladder_cases", "ladder_bytes"),
    "ladder_static": lazily("ladder_cases", "ladder_static"),
    "latent_tiles": lazily("mla_kernel_cases", "latent_tiles"),
    "static": lazily("static_cases", "static"),
    "decode": decode,
    "paged_decode": lazily("gpu_cases", "decodes"),
    "paged_kinds": lazily("gpu_cases", "decode_kinds"),
    "paged_prefill": lazily("gpu_cases", "prefill"),
    "latent_decode": lazily("mla_gpu_cases", "mla"),
    "paged_tree": lazily("gpu_cases", "tree"),
    "tune": lazily("tune_cases", "tune"),
    "check_attention": on_device("gpu_checks", "attention"),
    "check_kernels": on_device("gpu_checks", "kernels"),
    "check_engine": on_device("engine_checks", "engine"),
}
GPU_CHECKS = (
    GpuCase("check_attention", value=10, seconds=120),
    GpuCase("check_kernels", value=9, seconds=75),
    GpuCase("check_engine", value=8, seconds=90),
)
GPU_CASES = (
    GpuCase("paged_decode", value=10, seconds=120, check="check_attention"),
    GpuCase("paged_kinds", value=9, seconds=120, check="check_attention"),
    GpuCase("paged_prefill", value=8, seconds=120, check="check_attention"),
    GpuCase("latent_decode", value=8, seconds=120, check="check_kernels"),
    GpuCase("decode", value=7, seconds=100, check="check_engine"),
    GpuCase("tune", value=6, seconds=120, check="check_attention"),
    GpuCase("paged_tree", value=6, seconds=45, check="check_attention"),
)
NEEDS_GPU = tuple(case.name for case in (*GPU_CHECKS, *GPU_CASES) if case.name != "decode")
KERNEL_PEERS = ("flashinfer-python", "vllm")

SUITE = Suite(
    room=ROOM,
    cases=CASES,
    needs_gpu=NEEDS_GPU,
    gpu=[case.name for case in (*GPU_CHECKS, *GPU_CASES)],
    peers={name: KERNEL_PEERS for name in NEEDS_GPU if not name.startswith("check_")},
    checkpoint=rooms.ROOT / "build" / SHAPE,
    tiny=lambda: resolve_model(TINY),  # it stands for the 1.1B shape too
)

if __name__ == "__main__":
    main(SUITE, __doc__)
