"""What the ratio gates of tasks 0.1 to 0.3 measure: two subjects that take turns in one run, on one machine.

A comparison that serves several gates is run once a process. The 1.1B checkpoint is random and takes 2.2 GB of disk
while it is loaded; one that lies in build/tinyllama-1.1b (`titan checkpoint` writes it) is used instead.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from module0_profiling import rooms
from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from module0_profiling.timing import Timing, ratio
from phase0_prototype import workloads
from phase0_prototype.bandwidth import decode_shares
from phase0_prototype.cpu_memory import keep_freed_memory
from phase0_prototype.llm import LLM
from phase0_prototype.workloads import SHAPE, TINY, Run, in_turns

ROUNDS = 5
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "max_model_len": 1152, "max_num_seqs": 32}


def kv_cache_speedup(use: Use) -> Measured:
    """Time of the framework over that of these parts, to generate 200 tokens after a prompt of 384.

    After a shorter prompt, titan-tiny is held back by the number of its operations, which a cache does not change.
    """
    framework = use.choose("phase0", "framework")
    slow, fast = (LLM(TINY, device="cpu", max_num_seqs=1, runner="eager", use=u) for u in (framework, use))
    prompts = workloads.random_prompts(slow.engine.config.vocab_size, [384])
    runs = in_turns(
        {
            "the framework": partial(workloads.run_ours, slow, prompts, 200),
            "this cache": partial(workloads.run_ours, fast, prompts, 200),
        },
        2,
        Console(),
    )
    return compare(runs, _whole)


def batching_speedup(use: Use) -> Measured:
    """Time of eight prompts one after the other over that of the same prompts together, 64 tokens each."""
    llm = LLM(TINY, device="cpu", max_num_seqs=8, runner="eager", use=use)
    prompts = workloads.random_prompts(llm.engine.config.vocab_size, list(workloads.LENGTHS_OF_8))
    runs = in_turns(
        {
            "one by one": partial(workloads.run_alone, llm, prompts, 64),
            "together": partial(workloads.run_ours, llm, prompts, 64),
        },
        3,
        Console(),
    )
    return compare(runs, _whole)


def compile_speedup(use: Use) -> Measured:
    """Time of an eager decode step over that of a compiled one, titan-tiny at batch 1."""
    return _runner_speedup(use, "compile", "cpu")


def graph_speedup(use: Use) -> Measured:
    """Time of an eager decode step over that of a CUDA graph, titan-tiny at batch 1; needs CUDA."""
    return _runner_speedup(use, "cuda-graph", "cuda")


def decode_speedup_1(use: Use) -> Measured:
    """Time of a decode step of `transformers` over ours, 1.1B in bfloat16, batch 1."""
    return compare(_beside_transformers(use, 1, 128, 24), lambda run: run.per_step)


def decode_speedup_8(use: Use) -> Measured:
    """The same at batch 8."""
    return compare(_beside_transformers(use, 8, 128, 16), lambda run: run.per_step)


def decode_speedup_32(use: Use) -> Measured:
    """The same at batch 32."""
    return compare(_beside_transformers(use, 32, 128, 8), lambda run: run.per_step)


def prefill_speedup_128(use: Use) -> Measured:
    """Time until `transformers` has the first token after a prompt of 128, over ours."""
    return compare(_beside_transformers(use, 1, 128, 24), lambda run: run.prefill)


def prefill_speedup_1024(use: Use) -> Measured:
    """The same with a prompt of 1024."""
    return compare(_beside_transformers(use, 1, 1024, 4), lambda run: run.prefill)


def bandwidth_share(use: Use) -> Measured:
    """Bytes that a compiled decode step must read, by its time, over the read bandwidth: in turns, the median share."""
    with _checkpoint() as directory:
        llm = LLM(str(directory), **SETTINGS | {"max_num_seqs": 1}, runner="compile", use=use)
    found = decode_shares(llm, ROUNDS)
    share = Timing(found.shares)
    read, peak = (statistics.median(values) / 1e9 for values in (found.read, found.bandwidth))
    return Measured(share.median, f"{read:.1f} of {peak:.1f} GB/s", share.spread)


def _runner_speedup(use: Use, runner: str, device: str) -> Measured:
    llms = {name: LLM(TINY, device=device, max_num_seqs=1, runner=name, use=use) for name in ("eager", runner)}
    prompts = workloads.random_prompts(llms["eager"].engine.config.vocab_size, [8])
    subjects = {name: partial(workloads.run_ours, llm, prompts, 200) for name, llm in llms.items()}
    return compare(in_turns(subjects, ROUNDS, Console()), lambda run: run.per_step)


def _checkpoint() -> AbstractContextManager[Path]:
    return workloads.random_checkpoint(SHAPE, rooms.ROOT / "build" / SHAPE)


@functools.cache
def _engines(use: Use) -> tuple[LLM, Any]:
    """Our engine and the model of `transformers`, on the same 1.1B checkpoint."""
    with _checkpoint() as directory:
        llm = LLM(str(directory), **SETTINGS, runner="eager", use=use)
        peer = workloads.load_transformers(directory, torch.bfloat16, "cpu")
    keep_freed_memory()  # both gain
    return llm, peer


@functools.cache
def _beside_transformers(use: Use, batch: int, length: int, new_tokens: int) -> dict[str, list[Run]]:
    llm, peer = _engines(use)
    prompts = workloads.random_prompts(llm.engine.config.vocab_size, [length] * batch)
    subjects = {
        "transformers": partial(workloads.run_transformers, peer, prompts, new_tokens),
        "ours": partial(workloads.run_ours, llm, prompts, new_tokens),
    }
    return in_turns(subjects, ROUNDS, Console())


def compare(runs: dict[str, list[Run]], seconds: Callable[[Run], float]) -> Measured:
    """How many times longer the first subject takes than the second, round by round."""
    (slow, a), (fast, b) = ((name, Timing(tuple(map(seconds, done)))) for name, done in runs.items())
    ratios = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    spread = (max(ratios) - min(ratios)) / ratio(a, b)
    return Measured(ratio(a, b), f"{slow} {a.median * 1e3:.3g} ms, {fast} {b.median * 1e3:.3g} ms", spread)


def _whole(run: Run) -> float:
    return run.prefill + run.decode
