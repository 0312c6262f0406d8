"""What the exact and count gates of phase 1 measure: numbers that no machine changes.

Each function takes a `Use` and runs the real engine with those parts on a tiny random checkpoint, in float32 on the
CPU. It looks at the engine from outside, so a part of the learner's needs no counter of its own. `speed_checks.py` has
the ratios, `allocator_checks.py` what concerns the allocator alone.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.checks import SHAPE, VOCAB
from phase0_prototype.llm import LLM as PrototypeLLM
from phase0_prototype.outputs import RequestOutput
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import random_prompts
from phase1_memory import simulator_cases
from phase1_memory.allocator import Run, Want
from phase1_memory.llm import LLM
from phase1_memory.runs import Write

PAGE = 16
SCARCE = {"num_blocks": 14, "max_model_len": 200}  # of 24 requests of up to 180 tokens, one fits with ease, three don't


@dataclass(frozen=True)
class Workload:
    """Requests of different lengths; which, is fixed."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    def run(self, llm: PrototypeLLM) -> list[list[int]]:
        """Generated tokens of each."""
        return _tokens(llm.generate(self.prompts, self.params, progress=False))


def workload() -> Workload:
    """24 requests, greedy or drawn at random with a seed, that don't end before their time."""
    dice = random.Random(1)
    lengths = [dice.randint(3, 90) for _ in range(24)]
    params = [
        SamplingParams(temperature=dice.choice((0.0, 0.8)), seed=i, max_tokens=dice.randint(5, 90), ignore_eos=True)
        for i in range(24)
    ]
    return Workload(random_prompts(VOCAB, lengths), params)


def mismatches_when_exhausted(use: Use, preemption: str, **settings: Any) -> Measured:
    """Tokens that differ from phase 0's, with so few blocks that sequences must give theirs up again and again."""
    work = workload()
    with engine(use, preemption=preemption, **SCARCE, **settings) as llm:
        found = work.run(llm)
        left = llm.engine.kv.tables.num_blocks - llm.engine.kv.num_free
        preemptions = llm.engine.scheduler.preemptions
    wrong = sum(a != b for x, y in zip(found, _expected(), strict=True) for a, b in zip(x, y, strict=True))
    return Measured(wrong + left, f"{preemptions} preemptions, {left} blocks not returned")


def recompute_mismatches(use: Use) -> Measured:
    """Blocks are dropped and computed again."""
    return mismatches_when_exhausted(use, "recompute")


def swap_mismatches(use: Use) -> Measured:
    """Blocks go to main memory and come back."""
    return mismatches_when_exhausted(use, "swap")


def file_mismatches(use: Use) -> Measured:
    """Blocks go to a file and come back."""
    with tempfile.TemporaryDirectory() as folder:
        return mismatches_when_exhausted(use, "swap", swap_bytes=0, offload_dir=folder, offload_bytes=1 << 22)


def running_together(use: Use) -> Measured:
    """Mean number of sequences in a forward pass, over that of the framework, on the same scarce memory.

    Each may have 170 tokens and ends after 30 on average: who reserves the worst case reserves it in vain.
    """
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=170, stop_token_ids=list(range(16, 26)), ignore_eos=True)
        for i in range(32)
    ]
    work = Workload(random_prompts(VOCAB, [8 + i % 16 for i in range(32)]), params)

    def mean(parts: Use) -> float:
        seen: list[int] = []
        with engine(parts, num_blocks=40, max_model_len=200) as llm:
            _on_step(llm, lambda step: seen.append(len(step.requests)))
            work.run(llm)
        return sum(seen) / len(seen)

    ours, theirs = mean(use), mean(use.choose("phase1", "framework"))
    return Measured(ours / theirs, f"{ours:.1f} sequences, reserving the worst case {theirs:.1f}")


def wasted_places(use: Use) -> Measured:
    """Share of the token places of taken blocks that hold no token, in percent, all steps together.

    The sequences are about 200 tokens long, as in published traces of chats: half a block of 16 is 4 % of them.
    """
    params = SamplingParams(temperature=0, max_tokens=56, ignore_eos=True)
    work = Workload(random_prompts(VOCAB, [150 + 4 * i for i in range(12)]), [params] * 12)
    places = tokens = 0
    with engine(use, num_blocks=400, max_model_len=256) as llm:
        kv, scheduler = llm.engine.kv, llm.engine.scheduler

        def look(step: Any) -> None:
            nonlocal places, tokens
            places += (kv.tables.num_blocks - kv.num_free) * PAGE
            tokens += sum(request.num_tokens for request in scheduler.running)

        _on_step(llm, look)
        work.run(llm)
    return Measured(100 * (places - tokens) / places, f"{tokens} tokens in {places} places")


def prompt_tokens_for_eight(use: Use) -> Measured:
    """Tokens that the model is given for the prompt when eight continuations of it are asked for."""
    (prompt,) = random_prompts(VOCAB, [50])
    params = SamplingParams(temperature=0.9, n=8, seed=5, max_tokens=1, ignore_eos=True)
    with engine(use) as llm:
        found = llm.generate(prompt, params, progress=False)
        computed = llm.engine.runner.forward_tokens
    with prototype() as llm0:
        assert _tokens(found) == _tokens(llm0.generate(prompt, params, progress=False)), "wrong continuations"
    return Measured(computed, f"the prompt has {len(prompt)}")


def blocks_for_a_fork(use: Use) -> float:
    """Blocks more that seven forks of a sequence of 50 tokens take, before one of them writes."""
    with engine(use) as llm:
        kv = llm.engine.kv
        assert kv.reserve([Write("parent", 0, 50)])
        before = kv.num_free
        had = [kv.tables.fork("parent", f"child {i}", 50) for i in range(7)]
        if had != [50] * 7:  # what a fork does not have, it computes again into blocks of its own
            assert kv.reserve([Write(f"child {i}", tokens, 50) for i, tokens in enumerate(had)])
        return float(before - kv.num_free)


def calls_per_step(use: Use) -> Measured:
    """Most calls of the allocator in one step of the engine."""
    work = workload()
    most = calls = 0
    with engine(use, num_blocks=400, max_model_len=200) as llm:
        allocator = llm.engine.kv.tables.allocator
        serve = allocator.step

        def counted(release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
            nonlocal calls
            calls += 1
            return serve(release, wanted)  # type: ignore[no-any-return]

        def look(step: Any) -> None:
            nonlocal most, calls
            most, calls = max(most, calls), 0

        llm.engine.kv.tables.allocator = Watched(allocator, counted)
        _on_step(llm, look)
        work.run(llm)
    return Measured(most, "releases and wants of all requests")


class Watched:
    """An allocator whose `step` is another function."""

    def __init__(self, allocator: Any, step: Any) -> None:
        self._allocator, self.step = allocator, step

    @property
    def num_blocks(self) -> int:
        """Blocks there are."""
        return int(self._allocator.num_blocks)

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return int(self._allocator.num_free)

    def largest_free_run(self) -> int:
        """Of the allocator."""
        return int(self._allocator.largest_free_run())


@contextmanager
def engine(use: Use, **settings: Any) -> Iterator[LLM]:
    """The engine of phase 1 with these parts on the tiny checkpoint, on one thread."""
    with _tiny() as path:
        fixed = {"dtype": "float32", "device": "cpu", "runner": "eager", "use": use, "block_size": PAGE}
        yield LLM(path, **{**fixed, **settings})


@contextmanager
def prototype(**settings: Any) -> Iterator[PrototypeLLM]:
    """The solution of phase 0 on the same checkpoint."""
    with _tiny() as path:
        fixed = {"dtype": "float32", "device": "cpu", "runner": "eager", "use": "phase0=solution"}
        yield PrototypeLLM(path, **{**fixed, **settings})


@contextmanager
def _tiny() -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tiny tensors a second one only waits
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield str(write_checkpoint(SHAPE, Path(folder) / "tiny", dtype="float32"))
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _expected() -> list[list[int]]:
    with prototype() as llm:
        return workload().run(llm)


def _tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def _on_step(llm: LLM, look: Any) -> None:
    """Call `look(step)` after each decision of the scheduler."""
    decide = llm.engine.scheduler.next_step

    def watched() -> Any:
        step = decide()
        look(step)
        return step

    llm.engine.scheduler.next_step = watched


def fragmentation(use: Use) -> float:
    """Share of the memory given to 1024 simulated requests that holds no token. The solution's, whatever `use`."""
    return simulator_cases.fragmentation()


def batch_over_contiguous(use: Use) -> float:
    """Simulated batch of pages over that of rows of max_model_len, same memory. The solution's, whatever `use`."""
    return simulator_cases.batch_over_contiguous()
