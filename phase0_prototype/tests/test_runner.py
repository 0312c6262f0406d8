"""A compiled decode step says what the eager one says, and is compiled a few times only."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from phase0_prototype import runner as solution
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import random_prompt, with_files

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


@compiles
def test_compiled_decodes_are_token_exact_and_few_shapes_are_compiled(checkpoint, load, part, tmp_path, monkeypatch):
    torch._dynamo.reset()
    step = 16
    if hasattr(part("runner"), "LENGTH_STEP"):
        monkeypatch.setattr(part("runner"), "LENGTH_STEP", step)  # crossing a boundary needs few tokens
    checkpoint = checkpoint("mistral-window")
    prompts, params = [random_prompt(5), random_prompt(9)], [greedy(10), greedy(20)]
    expected = [o.outputs[0].token_ids for o in load(checkpoint).generate(prompts, params)]
    torch._dynamo.utils.counters.clear()
    llm = load(checkpoint, runner="compile")
    got = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    assert got == expected
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # two sequences at lengths up to 16 and 32, then one sequence at 32
    assert compiled <= 3
    again = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    assert again == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled, "the second run compiled again"
