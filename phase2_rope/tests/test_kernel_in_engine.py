"""The GPU's path of the layers (table, rows, one launch that turns and writes), in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util

import pytest

from phase0_prototype.tests.interpreter import interpreted

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from phase0_prototype.sampling_params import SamplingParams
from phase2_rope.llm import LLM
from phase2_rope.rotary import Rotary
gathered, calls = Rotary.forward, 0
def as_on_a_gpu(self, places):
    global calls
    calls += 1
    if self.inv_freqs is None:
        return self.cos_sin, places
    return self._cos_sin(places[0], self.inv_freqs[places[1]]), torch.arange(places.shape[1])
prompts, params = [list(range(5, 25)), [7], list(range(40, 43))], SamplingParams(temperature=0, max_tokens=4)
said = {}
for path in sys.argv[1:]:
    for name, forward in (("cpu", gathered), ("kernel", as_on_a_gpu)):
        Rotary.forward = forward
        llm = LLM(path, dtype="float32", device="cpu", runner="eager", max_num_batched_tokens=16)
        said[f"{path} {name}"] = [o.outputs[0].token_ids for o in llm.generate(prompts, params, progress=False)]
said["calls"] = calls
print(json.dumps(said))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)")
def test_the_kernels_path_says_the_same(checkpoint, deepseek, scaled):
    paths = [
        str(made.path) for made in (checkpoint("llama-gqa"), deepseek("v3"), deepseek("v3-halves"), scaled("dynamic"))
    ]
    said = interpreted(SCRIPT, *paths)
    assert said["calls"] > 4 * len(paths)
    for path in paths:
        assert said[f"{path} cpu"] == said[f"{path} kernel"]
