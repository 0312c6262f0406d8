"""Benchmark cases of the paged kernels on a GPU: decodes, kinds of them, prompts, trees."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from module0_profiling.bench import Options
from module0_profiling.results import Figure
from module0_profiling.timing import ratio
from phase3_paged_attention.measures.attention_figures import Rates, figures_of, geometric_mean, plan_figures
from phase3_paged_attention.measures.attention_inputs import Case, decode, extend, zipf_lengths
from phase3_paged_attention.measures.attention_peers import FLASHINFER, PEERS, Peer
from phase3_paged_attention.measures.attention_steps import rung
from phase3_paged_attention.measures.attention_timing import (
    OURS,
    OURS_ALONE,
    Bench,
    Prepare,
    race,
    ready,
    timed,
)
from phase3_paged_attention.measures.torch_peers import VARLEN_PAGES

SHAPES = ((32, 8, 128), (32, 8, 64), (64, 8, 128))  # Hq, Hkv, D
BATCHES, LENGTHS = (64, 8, 1, 256), (8192, 2048, 512, 32768)
SECONDS = 105.0  # of a case, after which it begins nothing new
LONG = 8192
PROMPTS = (8192, 2048, 32768, 1024, 4096, 16384)
CHUNK = 512
DRY_HEADS = (4, 2, 16)
DRY: dict[str, Any] = {"dtype": torch.float16}
TORCH = ("SDPA, contiguous", "gather + SDPA", "gather + unfused", "varlen_attn")
KINDS = ("fp8_e4m3", "fp8_per_token_head", "fp8_e5m2")


def decode_grid(dry: bool) -> list[Case]:
    """Batches, lengths and heads, most valuable first."""
    if dry:
        return [decode(2, 40, DRY_HEADS, **DRY)]
    grid = [decode(b, n, heads) for n in LENGTHS for b in BATCHES for heads in SHAPES]
    return sorted(grid, key=lambda case: LENGTHS.index(case.lengths[0]) + BATCHES.index(len(case.lengths)))


def decodes(options: Options) -> tuple[Figure, ...]:
    """Batch x length x heads beside every variant of FlashInfer and vLLM's kernel; their geometric means.

    Raises:
        CheckFailed: a kernel is wrong on these inputs.
    """
    bench = bench_of(options)
    rates = Rates.now(bench.device, dry=bench.dry)
    figures, ratios = rates.figures, []
    for number, case in enumerate(bench.affordable(decode_grid(bench.dry))):
        found = timed(case, bench, peers=peers_of(FLASHINFER, "vLLM"))
        figures += figures_of(found, rates)
        best = found.best()
        ratios += [found.over(best)] if best else []
        figures += plan_figures(found) if number == 0 else []
    if ratios:
        name = f"geometric mean/{OURS} over the best FlashInfer"
        figures.append(Figure(name, geometric_mean(ratios), "x", note=f"{len(ratios)} sizes"))
    return (*figures, *bench.not_measured())


def decode_kinds(options: Options) -> tuple[Figure, ...]:
    """64 sequences of 8,192 tokens in other ways: PyTorch, FP8, rungs of the ladder, ragged lengths, other pages."""
    bench = bench_of(options)
    rates = Rates.now(bench.device, dry=bench.dry)
    batch, length, heads = (1, 20, DRY_HEADS) if bench.dry else (64, LONG, SHAPES[0])
    more: dict[str, Any] = DRY if bench.dry else {}
    plain = decode(batch, length, heads, **more)
    figures = rates.figures
    for case in bench.affordable([plain], copies=12):  # the heads are repeated: G caches more
        figures += figures_of(timed(case, bench, peers=peers_of(*TORCH)), rates)
    kinds = [decode(batch, length, heads, kv_format=kind, **more) for kind in KINDS[: 2 if bench.dry else None]]
    for case in bench.affordable(kinds):
        figures += _beside(case, plain, bench, rates)
    for case in bench.affordable([plain]):
        figures += figures_of(timed(case, bench, must={**OURS_ALONE, **rungs(bench.dry)}), rates)
    ragged = Case(zipf_lengths(batch, 30 if bench.dry else 32768), (1,) * batch, *heads, **more)
    for case in bench.affordable([ragged, decode(batch, length, heads, page=64, **more)]):
        figures += figures_of(timed(case, bench, peers=peers_of(FLASHINFER, "vLLM")), rates)
    for case in bench.affordable([] if bench.dry else [decode(batch, length, heads, page=VARLEN_PAGES)]):
        figures += figures_of(timed(case, bench, peers=peers_of("varlen_attn")), rates)
    return (*figures, *bench.not_measured())


def prefill(options: Options) -> tuple[Figure, ...]:
    """Causal prompts, and a chunk of 512 tokens at the end of 32,768, beside FlashInfer, SDPA and vLLM's kernel."""
    bench = bench_of(options)
    rates = Rates.now(bench.device, dry=bench.dry)
    if bench.dry:
        cases = [extend(1, 12, 12, DRY_HEADS, **DRY), extend(1, 20, 4, DRY_HEADS, **DRY)]
    else:
        first, *rest = (extend(1, n, n) for n in PROMPTS)
        cases = [first, extend(1, 32768, CHUNK), extend(1, LONG, LONG, (32, 8, 64)), *rest]
    figures = rates.figures
    for case in bench.affordable(cases, copies=20):
        found = timed(case, bench, peers=peers_of(FLASHINFER, "vLLM", "SDPA", "gather + SDPA"))
        figures += figures_of(found, rates)
    return (*figures, *bench.not_measured())


def tree(options: Options) -> tuple[Figure, ...]:
    """64 nodes of a tree for each of 16 sequences of 4,096 tokens, beside the same tokens plainly causal."""
    bench = bench_of(options)
    rates = Rates.now(bench.device, dry=bench.dry)
    sizes: tuple[int, int, int, tuple[int, int, int]] = (
        (2, 30, 5, DRY_HEADS) if bench.dry else (16, 4096 + 64, 64, SHAPES[0])
    )
    more: dict[str, Any] = DRY if bench.dry else {}
    cases = [extend(*sizes, tree=masked, **more) for masked in (False, True)]
    found = race([ready(case, bench, peers=peers_of(FLASHINFER)) for case in cases], bench)
    figures = [*rates.figures, *(figure for one in found for figure in figures_of(one, rates))]
    causal, masked = (one.timings[OURS] for one in found)
    figures.append(Figure("tree over causal/ours", ratio(masked, causal), "x", note="time"))
    return (*figures, *bench.not_measured())


def rungs(dry: bool) -> dict[str, Prepare]:
    """Every rung of the decode ladder; in a dry run the last."""
    from phase3_paged_attention.kernels import decode_ladder

    return {f"rung {name}": partial(rung, name) for name in decode_ladder.RUNGS[-1 if dry else 0 :]}


def _beside(quantised: Case, plain: Case, bench: Bench, rates: Rates) -> list[Figure]:
    """FP8 with its peers, and our kernel in 16 bits, in turns."""
    field = [ready(quantised, bench, peers=peers_of(FLASHINFER)), ready(plain, bench)]
    eight, sixteen = race(field, bench)
    share = quantised.bytes / plain.bytes
    over = ratio(eight.timings[OURS], sixteen.timings[OURS])
    name = f"{quantised}/time over 16 bits"
    return [*figures_of(eight, rates), Figure(name, over, "x", note=f"bytes: {share:.2f}")]


def peers_of(*prefixes: str) -> list[Peer]:
    """Those whose names begin so."""
    return [peer for peer in PEERS if peer.name.startswith(prefixes)]


def bench_of(options: Options) -> Bench:
    """Where a case runs, and until when it may begin something."""
    return Bench.within(SECONDS, options.device, 1 if options.dry else max(options.rounds, 5), options.dry)
