"""Benchmark cases of latent attention: bytes of a token, the two forms by queries and keys, and the engine."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.model_shape import ModelShape, load_shape
from module0_profiling.results import Figure
from module0_profiling.timing import interleave
from phase0_prototype import workloads
from phase0_prototype.prefill_attention import causal_mask
from phase0_prototype.workloads import in_turns, random_prompts
from phase2_rope import shapes
from phase2_rope.deepseek import LatentSpec
from phase2_rope.expanded import expanded
from phase2_rope.llm import LLM
from phase2_rope.mla import absorbed
from phase2_rope.mla_checks import SMALL, V2_LITE

QUERIES = (1, 8, 32, 64, 96, 128, 171, 224, 320, 512)
KEYS = (1024, 4096)
V3 = LatentSpec(num_heads=128, latent=512, rope=64, nope=128, value=128, scale=192**-0.5)
BF16 = 2  # bytes


def bytes_a_token(options: Options) -> tuple[Figure, ...]:
    """What a token leaves in one layer of the cache, bfloat16: arithmetic on published sizes, no clock."""
    v3 = load_shape("deepseek-v3")
    models = {
        "DeepSeek-V3, latent": _kv_bytes(v3),
        "DeepSeek-V3's heads, MHA": V3.num_heads * (V3.query + V3.value) * BF16,
        "Llama-3.1-405B, GQA": _kv_bytes(load_shape("llama3-405b")),
        "Llama-3-8B, GQA": _kv_bytes(load_shape("llama3-8b")),
        "TinyLlama-1.1B, GQA": _kv_bytes(load_shape("tinyllama-1.1b")),
    }
    return tuple(Figure(name, value, "B") for name, value in models.items())


def forms(options: Options) -> tuple[Figure, ...]:
    """Both forms on one sequence of V2-Lite's 16 heads, by new tokens and length; where their times cross."""
    spec, dtype, device = (SMALL if options.dry else V2_LITE), torch.bfloat16, torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    figures: list[Figure] = []
    for keys in (64,) if options.dry else KEYS:
        entries = torch.randn(keys, spec.entry, generator=generator).to(device, dtype)
        up = torch.randn(spec.num_heads, spec.nope + spec.value, spec.latent, generator=generator)
        up = (up * spec.latent**-0.5).to(device, dtype)
        ratios: list[tuple[int, float]] = []
        for queries in (1, 8) if options.dry else QUERIES:
            q = torch.randn(queries, spec.num_heads, spec.query, generator=generator).to(device, dtype)
            mask = causal_mask(queries, keys, None, device)
            with torch.inference_mode(), options.console.status(f"{queries} queries, {keys} keys"):
                both = {
                    name: partial(form, spec, q, entries, up, mask)
                    for name, form in (("absorbed", absorbed), ("expanded", expanded))
                }
                timings = interleave(both, rounds=options.rounds, device=options.device)
            row = f"{queries} new behind {keys - queries}"
            for name, timing in timings.items():
                figures.append(Figure(f"{row}/{name}", timing.median * 1e3, "ms", timing.spread))
            over = timings["expanded"].median / timings["absorbed"].median
            figures.append(Figure(f"{row}/absorbed faster", over, "x"))
            ratios.append((queries, over))
        crossing = crossing_of(ratios)
        if crossing is not None:
            figures.append(Figure(f"{keys} keys/break-even", crossing, "new tokens"))
    by_flops = spec.latent * (spec.nope + spec.value) / (2 * spec.latent - spec.nope - spec.value)
    return (*figures, Figure("by FLOPs/break-even", by_flops, "new tokens", note="many keys"))


def crossing_of(ratios: list[tuple[int, float]]) -> float | None:
    """Where a falling ratio passes 1, between two points along a line in logarithms; None where it doesn't."""
    for (q0, r0), (q1, r1) in itertools.pairwise(ratios):
        if r0 >= 1 > r1:
            share = math.log(r0) / (math.log(r0) - math.log(r1))
            return float(math.exp(math.log(q0) + share * (math.log(q1) - math.log(q0))))
    return None


def engine(options: Options) -> tuple[Figure, ...]:
    """Decode of a dense model with V2-Lite's attention, bfloat16: framework, solution and transformers."""
    figures: list[Figure] = []
    shape = shapes.TINY if options.dry else shapes.V2_LITE_DENSE
    longest = options.size(4224, 96)
    settings: dict[str, Any] = {"dtype": "bfloat16", "device": options.device, "max_model_len": longest}
    cases = [(1, 1024, 12), (8, 256, 12), (1, 4096, 8)]
    if options.dry:
        cases = [(2, 8, 3)]
    with shapes.checkpoint(shape) as path:
        peer = workloads.load_transformers(path, torch.bfloat16, options.device)
        engines = {
            name: LLM(str(path), num_blocks=8 * -(-longest // 16), max_num_seqs=8, use=f"phase2={name}", **settings)
            for name in ("framework", "solution")
        }
    for batch, length, new in cases:
        prompts = random_prompts(512, [length] * batch)
        subjects: dict[str, Any] = {
            name: partial(workloads.run_ours, llm, prompts, new) for name, llm in engines.items()
        }
        subjects["transformers"] = partial(workloads.run_transformers, peer, prompts, new)
        runs = in_turns(subjects, options.rounds, options.console)
        steps = {name: [run.per_step for run in done] for name, done in runs.items()}
        prefill = {name: [run.prefill for run in done] for name, done in runs.items()}
        row = f"batch {batch}, {length} tokens"
        for name, values in steps.items():
            figures.append(figure(f"{row}/{name}", [batch / s for s in values], "tokens/s"))
        for name in ("framework", "transformers"):
            figures.append(ratio(f"{row}/over {name}", steps[name], steps["solution"]))
        figures.append(ratio(f"{row}/prompt over transformers", prefill["transformers"], prefill["solution"]))
    return tuple(figures)


def _kv_bytes(shape: ModelShape) -> float:
    if shape.mla:
        return float(shape.mla.latent + shape.mla.rope) * BF16
    return 2.0 * shape.kv_heads * shape.head_dim * BF16
