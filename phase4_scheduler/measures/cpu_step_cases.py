"""What the CPU kernels make of a step: beside torch's operators, and beside what the machine can do."""

from __future__ import annotations

import statistics
from functools import partial

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.course.errors import CannotMeasure
from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from module0_profiling.results import Figure
from phase0_prototype.bandwidth import decode_shares
from phase0_prototype.workloads import SHAPE, TINY, random_checkpoint, random_prompts, run_ours
from phase4_scheduler.kernels import cpu
from phase4_scheduler.llm import LLM

BATCHES = (1, 8, 16, 32)
SHORT, PROMPT, NEW = 16, 128, 17
WAYS = {"torch": "off", "kernels": "on"}
GATE_BATCH, GATE_NEW, GATE_ROUNDS = 8, 48, 5


def cpu_step(options: Options) -> tuple[Figure, ...]:
    """Milliseconds of decode steps and of a prompt, by torch's operators and by the CPU kernels, the 1.1B shape.

    Raises:
        CheckFailed: the kernels can't run here.
    """
    if why := cpu.why_not_product():
        raise CheckFailed(why)
    make = partial(LLM, device="cpu", dtype="bfloat16", max_model_len=1024, max_num_seqs=BATCHES[-1], num_blocks=512)
    with random_checkpoint(SHAPE, options.checkpoint) as directory:
        llms = {way: make(str(directory), cpu_kernels=setting) for way, setting in WAYS.items()}
        return tuple(_steps(llms, options))


def _steps(llms: dict[str, LLM], options: Options) -> list[Figure]:
    batches, new = options.size(len(BATCHES), 2), options.size(NEW, 3)
    steps: dict[tuple[str, str], list[float]] = {}
    for round_ in range(options.rounds + 1):
        for way in list(llms) if round_ % 2 else reversed(list(llms)):
            llm = llms[way]
            vocab = llm.engine.config.vocab_size
            found = {f"decode, batch {n}": _decode(llm, n, new, round_) for n in BATCHES[:batches]}
            found[f"prompt of {PROMPT}"] = run_ours(llm, random_prompts(vocab, [PROMPT], round_), 1).prefill
            if not round_:
                continue
            for name, seconds in found.items():
                steps.setdefault((name, way), []).append(seconds)
    figures = [figure(f"{name}/{way}", [1e3 * s for s in values], "ms") for (name, way), values in steps.items()]
    for name in dict.fromkeys(name for name, _ in steps):
        figures.append(ratio(f"{name}/speedup", steps[name, "torch"], steps[name, "kernels"]))
    shares = decode_shares(llms["kernels"], options.rounds)
    note = f"GB/s read: {statistics.median(shares.bandwidth) / 1e9:.1f}; {shares.skipped} unsteady rounds repeated"
    return [*figures, figure("decode, batch 1/share of the bandwidth", shares.shares, "", note)]


def _decode(llm: LLM, batch: int, new: int, seed: int) -> float:
    prompts = random_prompts(llm.engine.config.vocab_size, [SHORT] * batch, seed)
    return run_ours(llm, prompts, new).per_step


def faster_by_kernels(use: Use) -> Measured:
    """Times that torch's operators need of the CPU kernels' time for decode steps of eight: titan-tiny, bfloat16.

    Raises:
        CannotMeasure: the kernels can't run here.
    """
    if why := cpu.why_not_product():
        raise CannotMeasure(why)
    make = partial(LLM, TINY, device="cpu", dtype="bfloat16", use=use, num_blocks=256)
    llms = {way: make(cpu_kernels=setting) for way, setting in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in llms}
    for round_ in range(GATE_ROUNDS + 1):
        for way, llm in llms.items():
            step = _decode(llm, GATE_BATCH, GATE_NEW, round_)
            if round_:
                seconds[way].append(step)
    ratios = [slow / fast for slow, fast in zip(seconds["torch"], seconds["kernels"], strict=True)]
    each = ", ".join(f"{way} {1e3 * statistics.median(values):.2f} ms" for way, values in seconds.items())
    return Measured(statistics.median(ratios), each)
