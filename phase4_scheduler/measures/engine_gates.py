"""What the gates ask of the whole engine: the tokens of phase 0 in any company, and more of them in a second."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.checks import SHAPE, VOCAB
from phase0_prototype.engine import ROOM as PROTOTYPE
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.speed_checks import compare
from phase0_prototype.workloads import TINY, Run, in_turns, random_prompts
from phase1_memory.checks import SCARCE, Workload, prototype, workload
from phase4_scheduler.llm import LLM
from phase4_scheduler.measures.gates_simulated import ROOM

CROWDED = {**SCARCE, "max_num_seqs": 8, "max_num_batched_tokens": 24}  # prompts of up to 90 tokens go in pieces
CANCELLED = {6: 0, 10: 1, 25: 2, 40: 3}  # step: which neighbour goes
REQUESTS = 14
SHORT, LONG = 10, 200
ROUNDS = 3


def recompute_mismatches(use: Use) -> Measured:
    """Tokens that differ from phase 0's, in pieces, among neighbours that are cancelled, with blocks that run out."""
    return _mismatches(use, preemption="recompute")


def swap_mismatches(use: Use) -> Measured:
    """The same, where short requests take the places of long ones, and who loses blocks comes back with them."""
    return _mismatches(use, preemption="swap", scheduling_policy="sjf")


def ahead_mismatches(use: Use) -> Measured:
    """The same, with each step decided and launched before the one before it is collected."""
    solution = use.choose(PROTOTYPE, "solution")  # another runner may wait for the device
    return _mismatches(solution, async_scheduling="on")


def throughput(use: Use) -> Measured:
    """Time of the framework over that of these parts: 16 short and 16 long answers, eight places, titan-tiny."""
    settings: dict[str, Any] = {"device": "cpu", "max_num_seqs": 8, "max_model_len": 512}
    llms = {
        "the framework": LLM(TINY, use=use.choose(ROOM, "framework"), **settings),
        "this scheduler": LLM(TINY, use=use, **settings),
    }
    with _one_thread():
        runs = in_turns({name: partial(_mixed, llm) for name, llm in llms.items()}, ROUNDS, Console())
    return compare(runs, lambda run: run.decode)


def _mismatches(use: Use, **settings: Any) -> Measured:
    """Tokens that differ, and blocks that are not returned."""
    names, work = [], _work()
    neighbours = random_prompts(VOCAB, [60, 20, 90, 5], seed=1)
    endless = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with _engine(use, **CROWDED, **settings) as llm:
        engine, steps = llm.engine, 0
        others = [engine.add_request(prompt, endless) for prompt in neighbours]
        for prompt, params in zip(work.prompts, work.params, strict=True):
            names.append(engine.add_request(prompt, params))
        found: dict[str, list[int]] = {}
        while engine.has_unfinished():
            found |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
            steps += 1
            if steps in CANCELLED:
                engine.abort(others[CANCELLED[steps]])
        kept = engine.kv.tables.num_blocks - engine.kv.num_free
        preemptions = engine.scheduler.preemptions
    right = dict(zip(names, _expected(), strict=True))
    wrong = sum(a != b for name in names for a, b in zip(found.get(name, []), right[name], strict=False))
    missing = sum(len(right[name]) - len(found.get(name, [])) for name in names)
    count = sum(map(len, right.values()))
    return Measured(wrong + missing + kept, f"{count} tokens, {preemptions} preemptions, {kept} blocks not returned")


@contextmanager
def _engine(use: Use, **settings: Any) -> Iterator[LLM]:
    """With these parts, on the tiny random checkpoint."""
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(SHAPE, Path(folder) / "tiny", dtype="float32")
        fixed = {"dtype": "float32", "device": "cpu", "runner": "eager", "block_size": 16, "use": use}
        yield LLM(str(path), **{**fixed, **settings})


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tiny tensors a second one only waits
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _expected() -> list[list[int]]:
    """What phase 0 says."""
    with prototype() as llm:
        return _work().run(llm)


def _work() -> Workload:
    """Requests of up to 180 tokens, greedy or drawn at random with a seed."""
    whole = workload()
    return Workload(whole.prompts[:REQUESTS], whole.params[:REQUESTS])


def _mixed(llm: LLM) -> Run:
    """Seconds for half short and half long answers."""
    vocab = llm.engine.config.vocab_size
    for prompt, length in zip(random_prompts(vocab, [16] * 32), (SHORT, LONG) * 16, strict=True):
        llm.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
    began = time.perf_counter()
    while llm.engine.has_unfinished():
        llm.engine.step()
    return Run(0.0, time.perf_counter() - began, 1, [])
