"""Phase 0 against its framework, `transformers` and the machine: `python -m phase0_prototype.benchmark [case ...]`.

    kv_cache   200 tokens of titan-tiny after a short and a long prompt: framework, KV cache, tokens computed
    compile    decode of titan-tiny: eager and compiled (CUDA graphs on a GPU)
    batching   8 prompts one after the other and together
    engines    TinyLlama-1.1B's shape in bfloat16: prefill and decode beside transformers
    one_sequence  decode of that shape by an engine for one sequence, and the memory's limit
    linear     linear layers of that shape: F.linear and packed weights, by rows
    roofline   the same under this machine's ceilings
    profile    where a decode step's time goes, framework and solution
    predict    steps of both models beside what `titan predict` says of them
    why_slow   verdicts of `titan why-slow` on the framework, titan-tiny and the 1.1B shape
    static     registers, spills, shared memory and occupancy of the CUDA trilogy (needs NVRTC or nvcc, no GPU)
    kernels    times of the CUDA trilogy beside torch (needs a GPU)
    check_kernels, check_engine
               what must be right on a GPU before it is timed: gpu_checks.py (need a GPU)

Every case times its subjects in turns (A B A B), several rounds, in one process, and writes
reports/results/phase0/<case>.json. The ratios are medians of ratios within a round. `--dry-run` goes through what the
GPU cases do with tiny sizes on the CPU, so that nothing fails on a GPU for a reason that has nothing to do with GPUs.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch

from module0_profiling import rooms
from module0_profiling.bench import Case, Options, Suite, figure, main, ratio
from module0_profiling.bench_gpu import GpuCase
from module0_profiling.hardware import detect, measured_peaks
from module0_profiling.results import Figure
from phase0_prototype import kernel_cases, linear_cases, predict_check, why_slow_cases, workloads
from phase0_prototype.bandwidth import decode_shares
from phase0_prototype.cpu_memory import keep_freed_memory
from phase0_prototype.hub import resolve_model
from phase0_prototype.llm import LLM
from phase0_prototype.workloads import SHAPE, TINY, in_turns

LINEAR_PARAMETERS = 22 * (2560 * 2048 + 2048 * 2048 + 3 * 5632 * 2048)  # a prompt goes through these; the head, one row
KEPT = rooms.ROOT / "build" / SHAPE


def kv_cache(options: Options) -> tuple[Figure, ...]:
    """The framework recomputes every token at every step; the cache computes each once. Short and long prompts."""
    names = {"framework": "phase0=framework", "solution": "phase0=solution"}
    figures: list[Figure] = []
    llms = {
        name: LLM(TINY, device=options.device, max_num_seqs=1, runner="eager", use=use) for name, use in names.items()
    }
    new = options.size(200, 3)
    for length in (8, options.size(384, 16)):
        prompts = workloads.random_prompts(4096, [length])
        before = {name: llm.engine.runner.forward_tokens for name, llm in llms.items()}
        subjects = {name: partial(workloads.run_ours, llm, prompts, new) for name, llm in llms.items()}
        runs = in_turns(subjects, options.rounds, options.console)
        seconds = {name: [r.prefill + r.decode for r in done] for name, done in runs.items()}
        row = f"prompt of {length}"
        for name, llm in llms.items():
            computed = (llm.engine.runner.forward_tokens - before[name]) / (options.rounds + 1)
            figures.append(figure(f"{row}/{name}", [new / s for s in seconds[name]], "tokens/s"))
            figures.append(Figure(f"{row}/{name}, computed", computed, "tokens"))
        figures.append(ratio(f"{row}/speedup", seconds["framework"], seconds["solution"]))
    return tuple(figures)


def compiled(options: Options) -> tuple[Figure, ...]:
    """Decode of the small model, which the cost of each operation holds back."""
    fast = _fast(options)
    llms = {runner: LLM(TINY, device=options.device, max_num_seqs=1, runner=runner) for runner in ("eager", fast)}
    prompts = workloads.random_prompts(4096, [8])
    new = options.size(200, 3)
    subjects = {name: partial(workloads.run_ours, llm, prompts, new) for name, llm in llms.items()}
    runs = in_turns(subjects, options.rounds, options.console)
    eager, quick = ([r.per_step for r in runs[name]] for name in ("eager", fast))
    return (
        figure("eager", [1 / s for s in eager], "tokens/s"),
        figure(fast, [1 / s for s in quick], "tokens/s"),
        ratio("speedup", eager, quick),
    )


def batching(options: Options) -> tuple[Figure, ...]:
    """Eight prompts of different lengths through the solution's engine: alone, and as one batch."""
    llm = LLM(TINY, device=options.device, max_num_seqs=8)
    prompts = workloads.random_prompts(4096, list(workloads.LENGTHS_OF_8))
    new = options.size(64, 2)
    subjects = {
        "alone": partial(workloads.run_alone, llm, prompts, new),
        "batch": partial(workloads.run_ours, llm, prompts, new),
    }
    runs = in_turns(subjects, options.rounds, options.console)
    seconds = {name: [r.prefill + r.decode for r in done] for name, done in runs.items()}
    return (
        figure("one_at_a_time", [8 * new / s for s in seconds["alone"]], "tokens/s"),
        figure("batch_of_8", [8 * new / s for s in seconds["batch"]], "tokens/s"),
        ratio("speedup", seconds["alone"], seconds["batch"]),
    )


def engines(options: Options) -> tuple[Figure, ...]:
    """Prefill and decode of the 1.1B shape beside transformers."""
    figures: list[Figure] = []
    length_limit, usual = options.size(1152, 64), options.size(128, 8)
    settings: dict[str, Any] = {"dtype": "bfloat16", "device": options.device, "max_model_len": length_limit}
    cases = [(1, usual, 24), (8, usual, 16), (32, usual, 8), (1, 8 * usual, 4)]
    if options.dry:
        cases = [(1, usual, 2), (2, usual, 2)]
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        peer = workloads.load_transformers(directory, torch.bfloat16, options.device)
        llm = LLM(str(directory), **settings, max_num_seqs=32)
        keep_freed_memory()  # both gain
        for batch, length, new in cases:
            prompts = workloads.random_prompts(llm.engine.config.vocab_size, [length] * batch)
            subjects = {
                "ours": partial(workloads.run_ours, llm, prompts, new),
                "transformers": partial(workloads.run_transformers, peer, prompts, new),
            }
            runs = in_turns(subjects, options.rounds, options.console)
            prefill = {n: [r.prefill for r in done] for n, done in runs.items()}
            decode = {n: [r.per_step for r in done] for n, done in runs.items()}
            if length == usual:
                for n, values in decode.items():
                    figures.append(figure(f"decode, batch {batch}/{n}", [batch / s for s in values], "tokens/s"))
                figures.append(ratio(f"decode, batch {batch}/speedup", decode["transformers"], decode["ours"]))
            if batch == 1:
                for n, values in prefill.items():
                    figures.append(figure(f"prefill, {length} tokens/{n}", [length / s for s in values], "tokens/s"))
                    flops = 2 * LINEAR_PARAMETERS * length
                    rate = figure(f"prefill, {length} tokens/{n}, rate", [flops / s / 1e12 for s in values], "TFLOP/s")
                    figures.append(rate)
                figures.append(ratio(f"prefill, {length} tokens/speedup", prefill["transformers"], prefill["ours"]))
        if not options.dry:
            peaks = measured_peaks(detect(options.device), refresh=True)
            figures.append(Figure("prefill, 128 tokens/matmul rate", peaks.matmul["bfloat16"] / 1e12, "TFLOP/s"))
    return tuple(figures)


def one_sequence(options: Options) -> tuple[Figure, ...]:
    """Decode by an engine for one sequence, compiled or captured: beside transformers, and in turns with the memory."""
    name, new = _fast(options), options.size(24, 2)
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        peer = workloads.load_transformers(directory, torch.bfloat16, options.device)
        llm = LLM(str(directory), dtype="bfloat16", device=options.device, max_num_seqs=1, runner=name)
    prompts = workloads.random_prompts(llm.engine.config.vocab_size, [options.size(128, 8)])
    subjects = {
        name: partial(workloads.run_ours, llm, prompts, new),
        "transformers": partial(workloads.run_transformers, peer, prompts, new),
    }
    runs = in_turns(subjects, options.rounds, options.console)
    decode = {n: [r.per_step for r in done] for n, done in runs.items()}
    rates = (
        figure(name, [1 / s for s in decode[name]], "tokens/s"),
        figure("transformers", [1 / s for s in decode["transformers"]], "tokens/s"),
        ratio("speedup", decode["transformers"], decode[name]),
    )
    if options.dry:
        return rates
    found = decode_shares(llm, 2 * options.rounds)
    by_bandwidth = sorted(zip(found.bandwidth, found.shares, strict=True))
    (slow, share_of_slow), (fast, share_of_fast) = by_bandwidth[0], by_bandwidth[-1]
    return (
        *rates,
        figure("bytes read", [r / 1e9 for r in found.read], "GB/s"),
        figure("read bandwidth", [b / 1e9 for b in found.bandwidth], "GB/s"),
        figure("share", [100 * share for share in found.shares], "%", f"{found.skipped} rounds were not steady"),
        Figure("slowest memory of a round", slow / 1e9, "GB/s"),
        Figure("share in that round", 100 * share_of_slow, "%"),
        Figure("fastest memory of a round", fast / 1e9, "GB/s"),
        Figure("share in that round, too", 100 * share_of_fast, "%"),
    )


def predicted(options: Options) -> tuple[Figure, ...]:
    """Steps of both models beside what `titan predict` says of them."""
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        models = {TINY: TINY} if options.dry else {TINY: TINY, SHAPE: str(directory)}
        return tuple(
            predict_check.figures(predict_check.check(models, options.rounds, options.console, options.device))
        )


def why_slow(options: Options) -> tuple[Figure, ...]:
    """The verdicts of `titan why-slow` and the floors behind them."""
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        return why_slow_cases.three(directory, options.device, options.size(64, 4), options.console)


def _fast(options: Options) -> str:
    if options.dry:
        return "eager"  # there is no graph to capture, and compiling takes longer than all of a dry run
    return "cuda-graph" if options.device.startswith("cuda") else "compile"


def profile(options: Options) -> tuple[Figure, ...]:
    """Share of each operation in a decode step, and how much of the step is operations at all."""
    from phase0_prototype.profile import decode_profile, profile_decode

    if options.dry:
        measured = profile_decode(LLM(TINY, device=options.device, max_num_seqs=1), context=8, steps=2)
        return (Figure("busy", measured.busy, ""),)
    return decode_profile(options.device)


CASES: dict[str, Case] = {
    "kv_cache": kv_cache,
    "compile": compiled,
    "batching": batching,
    "engines": engines,
    "one_sequence": one_sequence,
    "linear": lambda options: linear_cases.linear(
        options.device, options.rounds, options.console, linear_cases.DRY if options.dry else linear_cases.FULL
    ),
    "roofline": lambda options: linear_cases.on_the_roofline(options.device, options.rounds, options.console),
    "profile": profile,
    "predict": predicted,
    "why_slow": why_slow,
    "static": lambda options: kernel_cases.static(),
    "kernels": lambda options: kernel_cases.timed(dry=options.dry),
    "check_kernels": lambda options: _checks().kernels(options.device, dry=options.dry),
    "check_engine": lambda options: _checks().engine(options.device, dry=options.dry),
}
NEEDS_GPU = ("kernels", "check_kernels", "check_engine")

GPU_CHECKS = (GpuCase("check_kernels", value=10, seconds=60), GpuCase("check_engine", value=9, seconds=60))
GPU_CASES = (
    GpuCase("kernels", value=10, seconds=90, check="check_kernels"),
    GpuCase("engines", value=9, seconds=120, check="check_engine"),
    GpuCase("one_sequence", value=9, seconds=60, check="check_engine"),
    GpuCase("compile", value=8, seconds=60, check="check_engine"),
    GpuCase("kv_cache", value=7, seconds=60, check="check_engine"),
    GpuCase("profile", value=6, seconds=40),
    GpuCase("predict", value=6, seconds=120, check="check_engine"),
    GpuCase("why_slow", value=4, seconds=40, check="check_engine"),
    GpuCase("batching", value=5, seconds=60, check="check_engine"),
    GpuCase("linear", value=3, seconds=30),
)


def _checks() -> ModuleType:
    from phase0_prototype import gpu_checks

    return gpu_checks


SUITE = Suite(
    room=__package__ or "phase0_prototype",
    cases=CASES,
    needs_gpu=NEEDS_GPU,
    gpu=[case.name for case in (*GPU_CHECKS, *GPU_CASES)],
    peers={"engines": ("transformers",), "one_sequence": ("transformers",)},
    checkpoint=KEPT,
    tiny=lambda: resolve_model(TINY),  # it stands for the 1.1B shape too
)

if __name__ == "__main__":
    main(SUITE, __doc__)
