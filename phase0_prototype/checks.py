"""What the exact and count gates of tasks 0.1 to 0.3 measure: numbers that no machine changes.

Each function takes a `Use` and runs the real engine with those parts on a tiny random checkpoint, in float32 on the
CPU. It looks at the engine from outside (what the runner is given, which products torch is asked for), so a part of
the learner's needs no counter of its own. `speed_checks.py` has the ratios.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase0_prototype.batch import Batch
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.llm import LLM
from phase0_prototype.peak_memory import in_own_process
from phase0_prototype.products import WeightProducts
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase0_prototype.workloads import random_prompts

VOCAB, LAYERS, INTERMEDIATE = 320, 3, 80
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# 150 MB, in so many layers that one layer more is no large share.
LARGER = SHAPE | {  # 0.6 GB in bfloat16, most of it in a few large matrices, as in published models
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "head_dim": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LENGTHS = (3, 4, 5, 6, 7, 8, 9, 10)  # prompts of eight requests
NEW = (24, 20, 16, 24, 12, 8, 4, 24)  # tokens that each of them generates


def forward_tokens(use: Use) -> float:
    """Tokens that the runner is given while 200 are generated after a prompt of 8; each one once is 207."""
    with engine(use, max_num_seqs=1) as llm:
        seen = _watch(llm)
        llm.generate(random_prompts(VOCAB, [8]), _greedy(200), progress=False)
    return float(sum(batch.num_tokens for batch in seen))


def forward_passes(use: Use) -> Measured:
    """Forward passes for eight requests that generate up to 24 tokens each; together they need 24."""
    with engine(use, max_num_seqs=8) as llm:
        seen = _watch(llm)
        llm.generate(random_prompts(VOCAB, list(LENGTHS)), [_greedy(n) for n in NEW], progress=False)
    return Measured(len(seen), f"one after the other: {sum(NEW)}")


def padded_tokens(use: Use) -> float:
    """Rows that the linear layers multiply beyond the tokens of each step, for eight requests of different lengths."""
    with engine(use, max_num_seqs=8) as llm:
        seen = _watch(llm)
        with WeightProducts() as products:
            llm.generate(random_prompts(VOCAB, list(LENGTHS)), [_greedy(n) for n in NEW], progress=False)
    rows = sum(product.rows for product in products.found if product.in_features == INTERMEDIATE)  # down projections
    return rows / LAYERS - sum(batch.num_tokens for batch in seen)


def leaked_rows(use: Use) -> float:
    """Cache rows that are still taken after requests ended, were stopped while they ran, and while they waited."""
    with engine(use, max_num_seqs=4) as llm:
        before = llm.engine.kv.num_free
        ids = [llm.engine.add_request(p, _greedy(n)) for p, n in zip(_prompts(), NEW, strict=True)]
        for stopped in (ids[0], ids[6], ids[2]):
            for _ in range(3):
                llm.engine.step()
            llm.engine.abort(stopped)
        while llm.engine.has_unfinished():
            llm.engine.step()
        return float(before - llm.engine.kv.num_free)


def products_per_layer(use: Use) -> float:
    """Products with a weight matrix that one decode step of four sequences asks for in each layer."""
    with engine(use, max_num_seqs=4) as llm:
        kv, runner = llm.engine.kv, llm.engine.runner
        requests = [
            Request(str(i), prompt, _greedy(2), seed=0, eos_token_ids=(), max_tokens=2)
            for i, prompt in enumerate(_prompts()[:4])
        ]
        for request in requests:
            kv.acquire(request)
        for _ in range(2):  # all prompts in one step, then a decode step, whatever the scheduler would do
            step = Step(tuple(ScheduledRequest(r, r.num_computed_tokens, r.num_new_tokens) for r in requests))
            batch = Batch.build(step, [kv.blocks(r) for r in requests], kv.block_size, llm.engine.device)
            with WeightProducts() as products:
                runner.forward(batch)
            for request in requests:
                request.num_computed_tokens = kv.computed(request, request.num_tokens)
                request.append(16)
    return sum(VOCAB not in product.weight for product in products.found) / LAYERS  # the head is in no layer


def compiled_mismatches(use: Use) -> float:
    """Tokens of runner "compile" that differ from those of runner "eager"."""
    return float(_compiled(use)[0])


def steps_per_graph(use: Use) -> Measured:
    """Decode steps that each compiled graph serves, over 100 tokens; 0 when nothing is compiled."""
    _, graphs, calls = _compiled(use)
    return Measured(calls / graphs if graphs else 0.0, f"{graphs} compiled, called {calls} times")


def load_memory(use: Use) -> float:
    """Memory that loading a checkpoint takes at its peak, in multiples of the weights; in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        small = write_checkpoint(SHAPE, Path(folder) / "small", dtype="bfloat16")
        path = write_checkpoint(LARGER, Path(folder) / "larger", dtype="bfloat16")
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return in_own_process(path, small, str(use)) / weights


@contextmanager
def engine(use: Use, **settings: Any) -> Iterator[LLM]:
    """The engine with these parts on the tiny checkpoint, on one thread: for tiny tensors a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = write_checkpoint(SHAPE, Path(folder) / "tiny", dtype="float32")
            yield LLM(str(path), **{"dtype": "float32", "device": "cpu", "runner": "eager", "use": use, **settings})
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _compiled(use: Use) -> tuple[int, int, int]:
    """(tokens that differ from eager, graphs compiled, calls of them). Graphs run as traced: no compiler is needed."""
    graphs = calls = 0

    def compile_fx(graph: Callable[..., Any], inputs: Any, **options: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1

        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph(*args)

        return run

    def tokens(runner: str) -> list[int]:
        with engine(use, max_num_seqs=1, runner=runner) as llm:
            output = llm.generate(random_prompts(VOCAB, [8]), _greedy(101), progress=False)
        return output[0].outputs[0].token_ids

    expected = tokens("eager")
    torch._dynamo.reset()
    with mock.patch("torch._inductor.compile_fx.compile_fx", compile_fx):
        got = tokens("compile")
    torch._dynamo.reset()
    return sum(a != b for a, b in zip(expected, got, strict=True)), graphs, calls


def _watch(llm: LLM) -> list[Batch]:
    """The batches that the runner will be given."""
    seen: list[Batch] = []
    forward = llm.engine.runner.forward

    def watched(batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return forward(batch)  # type: ignore[no-any-return]

    llm.engine.runner.forward = watched
    return seen


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def _prompts() -> list[list[int]]:
    return random_prompts(VOCAB, list(LENGTHS))
