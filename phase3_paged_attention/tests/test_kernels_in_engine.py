"""The whole engine with the paged kernels, in Triton's interpreter on a CPU, beside the torch backend."""

from __future__ import annotations

import importlib.util
import json

import pytest

from phase0_prototype.tests.interpreter import interpreted

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from module0_profiling.course.parts import Use
from phase0_prototype.sampling_params import SamplingParams
from phase3_paged_attention.llm import LLM
prompts, params = [list(range(5, 25)), [7], list(range(40, 43))], SamplingParams(temperature=0, max_tokens=4)
said = {}
for use, settings, path in json.loads(sys.argv[1]):
    runs = {}
    for backend in ("torch", "triton"):
        llm = LLM(path, dtype="float32", device="cpu", runner="eager", use=Use.parse(use), attention_backend=backend,
                  **{"max_num_batched_tokens": 16, "max_model_len": 64, **settings})
        runs[backend] = [o.outputs[0].token_ids for o in llm.generate(prompts, params, progress=False)]
        runs[backend + " class"] = type(llm.engine.model.backend).__name__
    said[f"{use} {settings} {path}"] = runs
print(json.dumps(said))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)")
def test_the_kernels_say_what_torch_says(checkpoint, deepseek, use):
    made = (checkpoint("llama-gqa"), checkpoint("mistral-window"), deepseek("v3"))
    plain, window, latent = (str(x.path) for x in made)
    squeezed = {"num_blocks": 5, "block_size": 16, "watermark": 0}
    runs = [
        (str(use), {}, plain),
        (str(use), squeezed, plain),
        (str(use), {"kv_cache_dtype": "fp8_per_token_head"}, plain),
        (str(use), {}, window),
        (str(use), {}, latent),
    ]
    said = interpreted(SCRIPT, json.dumps(runs))
    assert len(said) == len(runs)
    for name, pair in said.items():
        assert pair["torch"] == pair["triton"], name
        assert pair["triton class"] != pair["torch class"], name
