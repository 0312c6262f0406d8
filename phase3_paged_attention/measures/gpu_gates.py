"""What the gates measure on a GPU: ratios in one run, at the sizes that the requirements speak of.

64 sequences of 8,192 tokens, 32 query heads and 8 KV heads of 128, pages of 16, bfloat16
"""

from __future__ import annotations

from functools import partial

from module0_profiling.course.parts import Use
from module0_profiling.timing import ratio
from phase3_paged_attention.measures.attention_figures import Rates, geometric_mean
from phase3_paged_attention.measures.attention_inputs import decode, extend
from phase3_paged_attention.measures.attention_peers import FLASHINFER
from phase3_paged_attention.measures.attention_steps import ours
from phase3_paged_attention.measures.attention_timing import OURS, Bench, Prepare, race, ready, timed
from phase3_paged_attention.measures.gpu_cases import LONG, TORCH, peers_of

PAGED_TORCH = "gather + "  # begins the names of PyTorch's ways to read pages
GRID = ((64, LONG), (8, LONG), (1, LONG), (64, 2048), (8, 2048), (1, 2048))


def decode_share_of_read(use: Use) -> float:
    """Minimum of bytes a second of a decode over what the device reads, in one run."""
    return _decode_rate(use) / Rates.now("cuda").read


def decode_share_of_copy(use: Use) -> float:
    """The same over what a copy reads and writes."""
    return _decode_rate(use) / Rates.now("cuda").copy


def over_best_flashinfer(use: Use) -> float:
    """Time of FlashInfer's fastest variant over ours: geometric mean over batches and lengths.

    Raises:
        ValueError: FlashInfer can't run here.
    """
    bench, ratios = Bench(), []
    for batch, length in GRID:
        found = timed(decode(batch, length), bench, peers=peers_of(FLASHINFER), must=_subject(use))
        best = found.best()
        ratios += [] if best is None else [found.over(best)]
    return _mean(ratios, bench)


def over_pytorch(use: Use) -> float:
    """Time of PyTorch's fastest way to attend to pages over ours."""
    found = timed(decode(64, LONG), Bench(), peers=peers_of(*TORCH), must=_subject(use))
    best = found.best(PAGED_TORCH)
    assert best is not None  # they always run
    return found.over(best)


def fp8_over_bf16(use: Use) -> float:
    """How many times faster a decode is on a cache in FP8 with one scale for all than in bfloat16."""
    bench = Bench()
    cases = [decode(64, LONG, kv_format=kind) for kind in ("fp8_e4m3", "auto")]
    eight, sixteen = race([ready(case, bench, must=_subject(use)) for case in cases], bench)
    return ratio(sixteen.timings[OURS], eight.timings[OURS])


def prefill_over_fa3(use: Use) -> float:
    """Time of FlashInfer's fastest variant over ours, for a prompt of 8,192 tokens.

    Raises:
        ValueError: FlashInfer can't run here.
    """
    bench = Bench()
    found = timed(extend(1, LONG, LONG), bench, peers=peers_of(FLASHINFER), must=_subject(use))
    best = found.best()
    return _mean([] if best is None else [found.over(best)], bench)


def tree_over_causal(use: Use) -> float:
    """Time of 64 nodes of a tree over that of 64 plainly causal tokens, 16 sequences of 4,096 tokens before them."""
    bench = Bench()
    cases = [extend(16, 4096 + 64, 64, tree=masked) for masked in (True, False)]
    masked, causal = race([ready(case, bench, must=_subject(use)) for case in cases], bench)
    return ratio(masked.timings[OURS], causal.timings[OURS])


def _decode_rate(use: Use) -> float:
    case = decode(64, LONG)
    return case.bytes / timed(case, Bench(), must=_subject(use)).timings[OURS].median


def _subject(use: Use) -> dict[str, Prepare]:
    return {OURS: partial(ours, use=use)}


def _mean(ratios: list[float], bench: Bench) -> float:
    if not ratios:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in bench.missing.items()))
    return geometric_mean(ratios)
