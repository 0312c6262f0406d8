"""What must be right on a GPU before anything is timed there: `python -m phase0_prototype.benchmark check_kernels`.

Each check returns its figures, and raises `CheckFailed` with one line when one of them is out of bounds.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.results import Figure
from phase0_prototype import workloads
from phase0_prototype.hub import resolve_model
from phase0_prototype.kernel_cases import operations
from phase0_prototype.kernels import harness, ladder
from phase0_prototype.kernels.operation import Operation, Tensors
from phase0_prototype.llm import LLM
from phase0_prototype.workloads import TINY

TRANSPOSES = ((512, 512), (1, 5), (33, 70), (257, 1000), (4096, 1028))  # rows, columns
PRODUCTS = ((512, 512, 512), (3, 130, 33), (257, 129, 1000), (1024, 2048, 512))  # m, n, k
DRY_TRANSPOSES, DRY_PRODUCTS = ((33, 70),), ((33, 40, 19),)
ALLOWED = {"transpose": 0.0}  # a copy is exact
ALLOWED_SUM = 1e-5  # of the largest value: float32 sums in another order
TIE = 1e-3  # two logits this near are a tie that rounding decides


def kernels(device: str, *, dry: bool = False) -> tuple[Figure, ...]:
    """Every version of the CUDA trilogy and its Triton twins against the torch twin in float64, at several shapes.

    In a dry run the CUDA versions run in the emulation; Triton must have been started with TRITON_INTERPRET=1.
    """
    figures, wrong = [], []
    for operation in operations(dry=dry):
        for version in (*(v.name for v in ladder.read(operation.source)), "triton"):
            worst, where = 0.0, ""
            for shape in _shapes(operation, dry):
                error = harness.error_of(operation, version, _inputs(shape, device), device)
                if math.isnan(error) or error > worst:
                    worst, where = (math.inf if math.isnan(error) else error), "x".join(map(str, shape))
            label = version if version.startswith(operation.name) else f"{operation.name}: {version}"
            allowed = ALLOWED.get(operation.name, ALLOWED_SUM)
            if worst > allowed:
                wrong.append(f"{label} is off by {worst:.2g} at {where}, {allowed:.2g} is allowed")
            else:
                figures.append(Figure(f"{label}/error", worst, "", note=f"{allowed:.0e} is allowed"))
    if wrong:
        raise CheckFailed("; ".join(wrong))
    return tuple(figures)


def engine(device: str, *, dry: bool = False, kind: type[LLM] = LLM, model: str = TINY) -> tuple[Figure, ...]:
    """Greedy tokens in float32: eager, as CUDA graphs, and the judgement of `transformers` on both.

    Each token must have the largest logit that `transformers` computes after all tokens before it, up to a tie. Token
    by token equality of three implementations would fail at the first tie, with nobody in the wrong.

    Args:
        device: "cuda", or "cpu" in a dry run.
        dry: few tokens.
        kind: whose engine.
        model: name or directory of a small model.
    """
    lengths, new = ((5, 9), 4) if dry else (list(workloads.LENGTHS_OF_8), 64)
    oracle = workloads.load_transformers(resolve_model(model), torch.float32, device)
    prompts = workloads.random_prompts(oracle.config.vocab_size, list(lengths))
    tokens: dict[str, list[list[int]]] = {}
    figures: list[Figure] = []
    for runner in ("eager", "cuda-graph") if device.startswith("cuda") else ("eager",):
        llm = kind(model, dtype="float32", device=device, max_num_seqs=len(prompts), runner=runner)
        tokens[runner] = workloads.run_ours(llm, prompts, new).token_ids
        short = max(_shortfall(oracle, p, t) for p, t in zip(prompts, tokens[runner], strict=True))
        if not short <= TIE:
            raise CheckFailed(
                f"{runner} chose a token whose logit is {short:.2g} below the best of transformers, {TIE} is a tie"
            )
        figures.append(Figure(f"{runner}/below the best logit", short, "", note=f"{TIE} is a tie"))
    flat = {runner: [token for sequence in made for token in sequence] for runner, made in tokens.items()}
    for runner, made in flat.items():
        different = sum(a != b for a, b in zip(made, flat["eager"], strict=True))
        figures.append(Figure(f"{runner}/unlike eager", different, "tokens", note=f"of {len(made)}, after a tie"))
    return tuple(figures)


def _shapes(operation: Operation, dry: bool) -> tuple[tuple[int, ...], ...]:
    if operation.name == "transpose":
        return DRY_TRANSPOSES if dry else TRANSPOSES
    return DRY_PRODUCTS if dry else PRODUCTS


def _inputs(shape: tuple[int, ...], device: str) -> Tensors:
    generator = torch.Generator().manual_seed(sum(shape))
    m, n, *k = shape
    sizes = [(m, k[0]), (k[0], n)] if k else [(m, n)]
    return tuple(torch.randn(size, generator=generator).to(device) for size in sizes)


@torch.inference_mode()
def _shortfall(oracle: Any, prompt: list[int], generated: list[int]) -> float:
    """By how much the logit of a generated token is at most below the best one, in the same context."""
    ids = torch.tensor([prompt + generated], device=oracle.device)
    logits = oracle(ids).logits[0, len(prompt) - 1 : -1].float()  # [new, V]
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())
