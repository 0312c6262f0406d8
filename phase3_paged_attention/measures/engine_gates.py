"""What a gate asks the engine in Triton's interpreter: does it say the same by its kernels as by torch?"""

from __future__ import annotations

import sys
from typing import Any

import torch

from module0_profiling.course.parts import Use
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import TINY
from phase3_paged_attention.llm import LLM
from phase3_paged_attention.measures.interpreted import answer

PROMPTS = ["def add(a,", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
LIMITS: dict[str, Any] = {"max_model_len": 32, "num_blocks": 8, "max_num_batched_tokens": 4}  # prompts come in chunks


def tokens(use: Use) -> dict[str, Any]:
    """Of titan-tiny: how many tokens there are, and how many are not those of the solution's torch backend."""
    said = []
    for backend, chosen in (("torch", use.choose("phase3", "solution")), ("triton", use)):
        llm = LLM(TINY, dtype="float32", device="cpu", runner="eager", attention_backend=backend, use=chosen, **LIMITS)
        said.append(
            [token for out in llm.generate(PROMPTS, GREEDY, progress=False) for token in out.outputs[0].token_ids]
        )
        used = type(llm.engine.model.backend).__name__
    other = sum(a != b for a, b in zip(*said, strict=True))
    return {"tokens": len(said[0]), "other": float(other), "backend": used}


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer({"tokens": tokens}, sys.argv[1:])
