"""The engine on the CPU kernels: tokens of transformers in float32, and in bfloat16 no further from it than torch."""

from __future__ import annotations

import pytest
import torch

from phase0_prototype.linear import Linear, Part
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import VARIANTS, random_prompt
from phase0_prototype.tests.conftest import one_thread  # noqa: F401  the same fixture here
from phase4_scheduler.cpu_attention import CpuAttention
from phase4_scheduler.cpu_layers import CpuMLP, CpuNorm, Panels
from phase4_scheduler.kernels import cpu
from phase4_scheduler.kernels.library import why_not_cpu_kernels
from phase4_scheduler.tests.test_engine_exact import greedy

pytestmark = pytest.mark.skipif(why_not_cpu_kernels() is not None, reason=str(why_not_cpu_kernels()))
PROMPTS = [random_prompt(length, seed=2) for length in (1, 40, 7, 2, 19, 33)]
NEW = (30, 12, 44, 3, 25, 20)


@pytest.mark.parametrize("variant", [*VARIANTS, "deepseek-v2", "deepseek-v3"])
def test_every_architecture_says_what_transformers_says(variant, tiny, load):
    made = tiny(variant)
    llm = load(made, cpu_kernels="on", max_num_batched_tokens=32)
    assert isinstance(llm.engine.runner.model.backend, CpuAttention) != variant.startswith("deepseek")
    params = [greedy(count) for count in NEW]
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        said = output.outputs[0].token_ids
        assert said == made.logits(prompt + said)[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.skipif(cpu.why_not_product() is not None, reason=str(cpu.why_not_product()))
@pytest.mark.parametrize("rows", [(64, 32, 32), (40, 24, 64)], ids=["panels", "not cut"])
def test_a_layer_of_parts_multiplies_by_all_of_them(rows):
    parts = tuple(Part(f"part{i}", n) for i, n in enumerate(rows))
    made = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    layer = Linear(parts, 48, bias=True, number_format=Panels(torch.bfloat16), **made)
    x, weight, bias = torch.randn(5, 48), torch.randn(sum(rows), 48), torch.randn(sum(rows))
    layer.bias.copy_(bias)
    for part, piece in zip(parts, weight.split(rows), strict=True):
        layer._weight_loader(sum(rows[: parts.index(part)]))(piece)
    assert layer.weight.dim() == (4 if rows[0] == 64 else 2)
    x, weight, bias = (tensor.bfloat16().float() for tensor in (x, weight, bias))
    torch.testing.assert_close(layer(x.bfloat16()).float(), x @ weight.T + bias, atol=0.1, rtol=2**-7)


def test_float16_stays_with_torch(load):
    llm = load("titan-tiny", dtype="float16", cpu_kernels="on")
    assert not isinstance(llm.engine.runner.model.backend, CpuAttention)
    assert len(llm.generate("import os\n", greedy(5, ignore_eos=True))[0].outputs[0].token_ids) == 5


def test_a_step_that_wants_no_token_computes_none(load):
    """The first piece of a long prompt: not one row goes to the head."""
    prompt = load("titan-tiny").generate("import os\n", greedy(60, ignore_eos=True))[0].outputs[0].token_ids
    llm = load("titan-tiny", dtype="bfloat16", max_num_batched_tokens=25)
    (output,) = llm.generate([prompt], greedy(5, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5


@pytest.mark.skipif(cpu.why_not_product() is not None, reason=str(cpu.why_not_product()))
@pytest.mark.parametrize("piece", [1, 64], ids=["by decodes", "by prompts"])
def test_in_bfloat16_they_are_as_near_to_float32_as_torch(piece, load):
    """Log-probabilities of a text, token by token and in pieces of prompts."""
    text = load("titan-tiny").generate("import os\n\n\ndef main(", greedy(120, ignore_eos=True))[0]
    tokens = text.prompt_token_ids + text.outputs[0].token_ids
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def logprobs(**settings):
        llm = load("titan-tiny", long_prefill_token_threshold=piece, **settings)
        (output,) = llm.generate([tokens], params)
        found = [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
        return llm, torch.tensor(found)

    _, exact = logprobs(cpu_kernels="off")
    _, by_torch = logprobs(cpu_kernels="off", dtype="bfloat16")
    llm, found = logprobs(cpu_kernels="on", dtype="bfloat16")
    modules = list(llm.engine.runner.model.modules())
    assert any(isinstance(m, CpuNorm) for m in modules) and any(isinstance(m, CpuMLP) for m in modules)
    assert any(isinstance(getattr(m, "format", None), Panels) for m in modules)
    assert (found - exact).abs().mean() <= 1.3 * (by_torch - exact).abs().mean()
