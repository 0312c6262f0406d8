"""Benchmark case `check_engine`: this phase's engine on a GPU is judged by `transformers`, as phase 0's is."""

from __future__ import annotations

from dataclasses import replace

from module0_profiling.results import Figure
from phase0_prototype import gpu_checks
from phase2_rope import shapes
from phase2_rope.llm import LLM


def engine(device: str, *, dry: bool = False) -> tuple[Figure, ...]:
    """titan-tiny, and a tiny random DeepSeek: eager and as CUDA graphs.

    Raises:
        CheckFailed: a token was chosen whose logit is more than a tie below the best of `transformers`.
    """
    figures = [replace(f, name=f"titan-tiny, {f.name}") for f in gpu_checks.engine(device, dry=dry, kind=LLM)]
    with shapes.checkpoint(shapes.TINY, "float32") as path:
        latent = gpu_checks.engine(device, dry=dry, kind=LLM, model=str(path))
    return (*figures, *(replace(f, name=f"latent attention, {f.name}") for f in latent))
