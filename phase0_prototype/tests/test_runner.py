"""A compiled decode step says what the eager one says, and is compiled a few times only."""

from __future__ import annotations

import functools
import os
import shutil

import pytest
import torch

from phase0_prototype import runner as solution
from phase0_prototype.batch import Batch
from phase0_prototype.llm import LLM
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import Step
from phase0_prototype.tests.checkpoints import random_prompt

compiles = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")),
    reason="torch.compile needs a C++ compiler: install g++ or clang",
)


def greedy(tokens):
    return SamplingParams(temperature=0, max_tokens=tokens)


def test_the_runner_counts_tokens_and_passes(checkpoint, load):
    llm = load(checkpoint("llama-gqa"))
    llm.generate([random_prompt(10), random_prompt(4)], greedy(1))
    counts = (llm.engine.runner.forward_tokens, llm.engine.runner.forward_passes)
    assert counts in [(14, 1), (14, 2)]  # together, or one after the other before task 0.2


def all_greedy(llm, prompts, counts):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, [greedy(n) for n in counts])]


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_few_shapes_are_compiled_while_sequences_grow_and_end(checkpoint, load, part, monkeypatch, fresh_compiler):
    """Counted with a backend that generates no code, so that a compilation costs little."""
    module, made = part("runner"), checkpoint("mistral-window")
    if hasattr(module, "LENGTH_STEP"):
        monkeypatch.setattr(module, "LENGTH_STEP", 16)  # few tokens cross a boundary
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    prompts, counts = [random_prompt(n) for n in (3, 9, 1, 5, 7)], [14, 22, 5, 9, 11]
    llm = load(made, runner="compile")
    assert all_greedy(llm, prompts, counts) == all_greedy(load(made), prompts, counts)
    # 5 sequences as 8 while the longest has 16 tokens, and while it has 32; then 4 (twice for 3), 2 and 1
    assert compilations() <= 5
    before = compilations()
    all_greedy(llm, prompts, counts)
    assert compilations() == before, "the same work compiled again"


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from inside the compiler
def test_compiled_decodes_are_token_exact(checkpoint, load, fresh_compiler):
    made = checkpoint("llama-one-layer")
    prompts, counts = [random_prompt(5), random_prompt(9)], [12, 12]
    assert all_greedy(load(made, runner="compile"), prompts, counts) == [
        made.greedy(p, n) for p, n in zip(prompts, counts, strict=True)
    ]


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_steps_of_one_sequence_are_token_exact(checkpoint, load, fresh_compiler):
    """One row: products, biases included, are loops that Inductor writes."""
    made = checkpoint("qwen2-tied")
    llm = load(made, runner="compile", max_num_seqs=1)
    assert all_greedy(llm, [random_prompt(9)], [24]) == [made.greedy(random_prompt(9), 24)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_a_padded_batch_gives_the_same_logits_and_leaves_their_rows_alone(checkpoint, load, count):
    """The solution's padding, which compiled and captured steps share, checked eagerly."""
    llm = LLM(checkpoint("mistral-window").path, dtype="float32", device="cpu", max_num_seqs=7, use="phase0=solution")
    engine = llm.engine
    for length in range(3, 3 + count):
        engine.add_request(random_prompt(length), greedy(9))
    engine.step()
    step = engine.scheduler.next_step()
    batch = Batch.build(
        step, [engine.kv.blocks(s.request) for s in step.scheduled], engine.kv.block_size, engine.device
    )
    wide = solution.padded(batch, engine.kv)
    assert wide.num_seqs == {1: 1, 2: 2, 3: 4, 5: 5, 6: 6, 7: 7}[count]  # 8 would not fit in 7 rows
    with torch.inference_mode():
        expected = engine.model(batch, engine.kv)
        before = [tensor.clone() for pair in engine.kv.layers for tensor in pair]
        got = engine.model(wide, engine.kv)
    torch.testing.assert_close(got[:count], expected, rtol=1e-5, atol=1e-5)
    after = [tensor for pair in engine.kv.layers for tensor in pair]
    for now, then in zip(after, before, strict=True):
        torch.testing.assert_close(now[:count], then[:count], rtol=1e-5, atol=1e-5)
    engine.abort_all()


def test_a_batch_is_not_padded_into_rows_that_others_use(checkpoint):
    llm = LLM(checkpoint("mistral-window").path, dtype="float32", device="cpu", max_num_seqs=8, use="phase0=solution")
    engine = llm.engine
    for length in (3, 4, 5, 6):
        engine.add_request(random_prompt(length), greedy(9))
    engine.step()
    step = engine.scheduler.next_step()
    some = Step(step.scheduled[:3])  # what a scheduler with mixed steps may do
    batch = Batch.build(some, [(0,), (1,), (2,)], engine.kv.block_size, engine.device)
    assert solution.padded(batch, engine.kv) is batch
    engine.abort_all()
