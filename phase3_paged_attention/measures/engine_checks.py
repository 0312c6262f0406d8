"""Benchmark case `check_engine`: the engine with our kernels on a GPU, eager and as CUDA graphs.

With an exact cache `transformers` judges the tokens. A quantised one changes them for good:
there, our kernels must read what torch's operations read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch

from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.results import Figure
from phase0_prototype import gpu_checks, workloads
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.gpu_checks import TIE
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import TINY
from phase2_rope import shapes
from phase3_paged_attention.gemma import ARCHITECTURES, GEMMA2_2B
from phase3_paged_attention.llm import LLM

TINY_GEMMA: Mapping[str, Any] = MappingProxyType(
    {  # windows that prompts outgrow, caps that scores of random weights reach
        **GEMMA2_2B,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "max_position_embeddings": 512,
        "sliding_window": 10,
        "attn_logit_softcapping": 1.5,
    }
)
FORMATS = ("fp8_e4m3", "fp8_per_token_head")
ALLOWED_MEAN = 0.01  # nats: a number on the border of two steps of FP8 may fall to either side


def engine(device: str, *, dry: bool = False) -> tuple[Figure, ...]:
    """titan-tiny, a tiny random DeepSeek, a tiny random Gemma 2, and titan-tiny with caches in FP8.

    Raises:
        CheckFailed: a token was chosen whose logit is more than a tie below the best of `transformers`; graphs choose
            others than eager steps; or what is read from a cache in FP8 is not what torch reads.
    """
    ours: Any = partial(LLM, attention_backend="triton")
    found = {"titan-tiny": gpu_checks.engine(device, dry=dry, kind=ours)}
    with shapes.checkpoint(shapes.TINY, "float32") as path:
        found["latent attention"] = gpu_checks.engine(device, dry=dry, kind=ours, model=str(path))
    with gemma_checkpoint() as path:
        found["windows and caps"] = windows_and_caps(str(path), device, dry=dry)
    found |= {name: quantised(name, device, dry=dry) for name in (FORMATS[1:] if dry else FORMATS)}
    return tuple(replace(f, name=f"{name}, {f.name}") for name, figures in found.items() for f in figures)


def windows_and_caps(model: str, device: str, *, dry: bool) -> tuple[Figure, ...]:
    """As `phase0_prototype.gpu_checks.engine`; torch's fused attention would leave the caps out, so it is not asked."""
    from transformers import AutoModelForCausalLM

    lengths, new = ((13,), 3) if dry else (list(workloads.LENGTHS_OF_8), 64)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    oracle = oracle.to(device).eval()
    prompts = workloads.random_prompts(oracle.config.vocab_size, list(lengths))
    figures = []
    for runner, tokens in _runs(model, device, prompts, new, "auto").items():
        short = max(_shortfall(oracle, prompt, made) for prompt, made in zip(prompts, tokens, strict=True))
        if not short <= TIE:
            raise CheckFailed(
                f"windows and caps, {runner}, chose a token whose logit is {short:.2g} below the best of transformers, "
                f"{TIE} is a tie"
            )
        figures.append(Figure(f"{runner}/below the best logit", short, "", note=f"{TIE} is a tie"))
    return tuple(figures)


def quantised(kv_cache_dtype: str, device: str, *, dry: bool) -> tuple[Figure, ...]:
    """Log-probabilities of prompts by the kernels and by torch, and tokens as graphs and eager, in one format."""
    lengths, new = ((9,), 3) if dry else (list(workloads.LENGTHS_OF_8), 64)
    said = {}
    for backend in ("torch", "triton"):
        llm = LLM(
            TINY, dtype="float32", device=device, runner="eager", attention_backend=backend,
            kv_cache_dtype=kv_cache_dtype, max_model_len=256,
        )  # fmt: skip
        prompts = workloads.random_prompts(llm.engine.config.vocab_size, list(lengths))
        said[backend] = _logprobs(llm, prompts)
    off = float((said["triton"] - said["torch"]).abs().mean())
    if not off <= ALLOWED_MEAN:
        raise CheckFailed(
            f"{kv_cache_dtype}: triton is {off:.2g} nats from torch on average, {ALLOWED_MEAN} are allowed"
        )
    figures = [Figure("off from torch", off, "nats", note=f"{ALLOWED_MEAN} on average are allowed")]
    tokens = _runs(TINY, device, prompts, new, kv_cache_dtype)
    for runner, made in tokens.items():
        same = sum(
            a == b for one, two in zip(made, tokens["eager"], strict=True) for a, b in zip(one, two, strict=True)
        )
        total = sum(map(len, made))
        if 2 * same < total:  # after a tie the rest of a sequence differs
            raise CheckFailed(f"{kv_cache_dtype}: {runner} chose {total - same} of {total} tokens otherwise than eager")
        figures.append(Figure(f"{runner}/unlike eager", total - same, "tokens", note=f"of {total}, after a tie"))
    return tuple(figures)


@contextmanager
def gemma_checkpoint() -> Iterator[Path]:
    """A seeded random Gemma 2 that is gone afterwards."""
    with TemporaryDirectory(prefix="titan-gemma-") as folder:
        yield write_checkpoint(dict(TINY_GEMMA), Path(folder) / "model", dtype="float32", architectures=ARCHITECTURES)


def _runs(model: str, device: str, prompts: list[list[int]], new: int, kept: str) -> dict[str, list[list[int]]]:
    """Greedy tokens in float32 by runner."""
    tokens = {}
    for runner in ("eager", "cuda-graph") if device.startswith("cuda") else ("eager",):
        llm = LLM(
            model, dtype="float32", device=device, runner=runner, attention_backend="triton", kv_cache_dtype=kept,
            max_num_seqs=len(prompts), max_model_len=256,
        )  # fmt: skip
        tokens[runner] = workloads.run_ours(llm, prompts, new).token_ids
    return tokens


def _logprobs(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """Of every token of the prompts but the first."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for prompt, output in zip(prompts, llm.generate(prompts, params, progress=False), strict=True):
        assert output.prompt_logprobs is not None
        positions = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        found += [position[token].logprob for position, token in positions if position is not None]
    return torch.tensor(found)


@torch.inference_mode()
def _shortfall(oracle: Any, prompt: list[int], generated: list[int]) -> float:
    """By how much the logit of a generated token is at most below the best one, in the same context."""
    ids = torch.tensor([prompt + generated], device=oracle.device)
    logits = oracle(ids).logits[0, len(prompt) - 1 : -1].float()  # [new, V]
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())
