"""Benchmark case `latent_decode`: attention to latents beside FlashInfer's, by heads, batch and number format."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from module0_profiling.bench import Options
from module0_profiling.course.parts import Use
from module0_profiling.results import Figure
from phase3_paged_attention.measures.attention_figures import Rates, figures_of, geometric_mean
from phase3_paged_attention.measures.attention_timing import OURS, Bench, Prepare, Timed, timed
from phase3_paged_attention.measures.gpu_cases import LONG, bench_of
from phase3_paged_attention.measures.mla_inputs import WORKLOAD, LatentCase, decode, ours
from phase3_paged_attention.measures.mla_peers import PEERS

HEADS = (16, 128, 32, 64)
SMALL = ((1, LONG), (8, LONG), (64, 2048), (1, 32768))
FEW_HEADS = (16, 32)  # bound by memory
DRY: dict[str, Any] = {"latent": 128, "rope": 16, "page": 16, "dtype": torch.float16}


def cases(dry: bool) -> list[LatentCase]:
    """Most valuable first: 64 sequences of 8,192 tokens, then small batches."""
    if dry:
        return [decode(2, 20, 4, packed=packed, **DRY) for packed in (False, True)]
    large = [decode(64, LONG, heads, packed=packed) for heads in HEADS for packed in (False, True)]
    small = [decode(*size, heads, packed=packed) for packed in (False, True) for size in SMALL for heads in (128, 16)]
    return [*large, *small, decode(64, LONG, 16, page=16)]


def mla(options: Options) -> tuple[Figure, ...]:
    """Time, GB/s and TFLOP/s beside what the device reaches in the same run.

    Raises:
        CheckFailed: the kernel is wrong on these inputs.
    """
    bench, ratios = bench_of(options), []
    rates = Rates.now(bench.device, dry=bench.dry)
    figures = rates.figures
    for case in bench.affordable(cases(bench.dry), copies=4):
        found = _timed(case, bench)
        figures += figures_of(found, rates, both=True)
        best = found.best()
        ratios += [found.over(best)] if best else []
    if ratios:
        note = f"{len(ratios)} sizes"
        figures.append(
            Figure(f"geometric mean/{OURS} over the best FlashInfer", geometric_mean(ratios), "x", note=note)
        )
    return (*figures, *bench.not_measured())


def mla_share_of_read(use: Use) -> float:
    """Minimum of bytes a second of 64 decodes of 8,192 tokens with 16 heads over what the device reads, in one run."""
    case = decode(64, LONG, 16)
    return case.bytes / _timed(case, Bench(), use).timings[OURS].median / Rates.now("cuda").read


def mla_over_best_flashinfer(use: Use) -> float:
    """Time of FlashInfer's fastest kernel for latents over ours: geometric mean over 16, 32, 64 and 128 heads.

    Raises:
        ValueError: FlashInfer can't run here.
    """
    bench = Bench()
    found = [_timed(decode(64, LONG, heads), bench, use) for heads in HEADS]
    ratios = [one.over(best) for one in found if (best := one.best()) is not None]
    if not ratios:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in bench.missing.items()))
    return geometric_mean(ratios)


def _timed(case: LatentCase, bench: Bench, use: Use | None = None) -> Timed:
    subject: dict[str, Prepare] = {OURS: partial(ours, use=use)}
    return timed(case, bench, peers=PEERS, must=subject, workload=WORKLOAD)
