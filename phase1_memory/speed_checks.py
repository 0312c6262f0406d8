"""What the ratio gates of phase 1 measure: two engines that take turns in one run, on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rich.console import Console

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use, resolve
from phase0_prototype.llm import LLM as PrototypeLLM
from phase0_prototype.speed_checks import compare
from phase0_prototype.workloads import TINY, in_turns, random_prompts, run_ours
from phase1_memory.llm import LLM

ROUNDS = 3


def gather_speedup(use: Use) -> Measured:
    """Time of a decode step of 32 sequences of about 200 tokens with the framework's attention, over that of this one.

    titan-tiny; everything but the attention is the solution's in both.
    """
    engines = {"the framework": _with_attention(use.choose("phase1", "framework")), "this": _with_attention(use)}
    return _decodes(engines, [150 + 3 * i for i in range(32)], 12)


def one_sequence_share(use: Use) -> Measured:
    """Time of a decode step of phase 0, whose cache is one piece, over that of this phase: titan-tiny, one sequence."""
    engines: dict[str, PrototypeLLM] = {
        "phase 0": PrototypeLLM(TINY, device="cpu", runner="eager", max_num_seqs=1, use=use),
        "this": LLM(TINY, device="cpu", runner="eager", use=use),
    }
    return _decodes(engines, [300], 48)


def same_memory_speedup(use: Use) -> Measured:
    """Time of phase 0 over that of this phase for 48 requests, in memory that holds four sequences of full length.

    titan-tiny; requests of 16 to 63 tokens that generate 32 more, where up to 1024 are allowed.
    """
    old = PrototypeLLM(TINY, device="cpu", runner="eager", max_num_seqs=4, use=use)
    blocks = 4 * old.engine.max_model_len // 16
    new = LLM(TINY, device="cpu", runner="eager", num_blocks=blocks, use=use)
    prompts = random_prompts(old.engine.config.vocab_size, [16 + i for i in range(48)])
    subjects = {"phase 0": partial(run_ours, old, prompts, 32), "this": partial(run_ours, new, prompts, 32)}
    return compare(in_turns(subjects, ROUNDS, Console()), lambda run: run.prefill + run.decode)


def _with_attention(use: Use) -> LLM:
    """The solution's engine with the attention of these parts."""
    backend = resolve("phase1_memory", "attention", use).PagedTorchAttention()
    llm = LLM(TINY, device="cpu", runner="eager", use=use.choose("phase1", "solution"))
    llm.engine.model.backend = backend
    for layer in llm.engine.model.layers:
        layer.attention.backend = backend
    return llm


def _decodes(engines: Mapping[str, PrototypeLLM], lengths: list[int], new_tokens: int) -> Measured:
    """Time of a decode step of the first engine over that of the second."""
    vocab = next(iter(engines.values())).engine.config.vocab_size
    prompts = random_prompts(vocab, lengths)
    subjects = {name: partial(run_ours, llm, prompts, new_tokens) for name, llm in engines.items()}
    return compare(in_turns(subjects, ROUNDS, Console()), lambda run: run.per_step)
