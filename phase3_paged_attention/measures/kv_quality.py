"""Benchmark case `kv_quality`: what a cache of smaller numbers costs in quality, on text that the model never saw.

The engine reads held-out text (phase 0's quality.py) with each format. Every query attends to what the cache holds, as
it does in generation, so the loss is that of quantised keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from module0_profiling.bench import Options
from module0_profiling.results import Figure
from phase0_prototype.corpus import Document
from phase0_prototype.quality import Loss, held_out_loss, read_held_out
from phase0_prototype.workloads import TINY
from phase3_paged_attention.kv_format import FORMATS
from phase3_paged_attention.llm import LLM

KINDS = tuple(dict.fromkeys(kept.name for kept in FORMATS.values()))
TOKENS = 24_000
USE = "phase0=solution,phase1=solution,phase2=solution"


def losses(
    documents: Sequence[Document], tokens: int, kinds: Sequence[str] = KINDS, *, device: str = "cpu", use: str = USE
) -> dict[str, Loss]:
    """The loss of titan-tiny in float32, by format of the cache; `auto` comes first.

    Args:
        documents: texts.
        tokens: stop after so many, at the end of a document.
        kinds: formats beside `auto`.
        device: as torch names it.
        use: whose parts compute.
    """
    found = {}
    for kind in ("auto", *kinds):
        llm = LLM(TINY, dtype="float32", device=device, kv_cache_dtype=kind, use=use, num_blocks=128, max_num_seqs=2)
        found[kind] = held_out_loss(llm, documents, max_tokens=tokens)
    return found


def worse_by(found: Loss, exact: Loss) -> float:
    """Percent of perplexity more than with an exact cache."""
    return 100 * math.expm1(found.nats_per_token - exact.nats_per_token)


def quality(options: Options) -> tuple[Figure, ...]:
    """Loss with each format, percent of perplexity that it costs."""
    figures = []
    documents = [Document("", "def add(a, b):\n    return a + b\n")] if options.dry else read_held_out()
    found = losses(documents, TOKENS, device=options.device)
    for kind, loss in found.items():
        figures.append(Figure(f"{kind}/loss", loss.nats_per_token, "nats/token", note=f"{loss.tokens:,} tokens"))
        figures.append(Figure(f"{kind}/perplexity over auto", worse_by(loss, found["auto"]), "%"))
    return tuple(figures)
