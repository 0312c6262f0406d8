"""Whether a model reads what it wrote: phase 0's framework computes every sequence anew, and here nobody asks it to."""

from __future__ import annotations

from typing import Any

import torch

from phase0_prototype.batch import Batch
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase1_memory.kv_cache import PagedKVCache


@torch.inference_mode()
def reads_cache(model: Any, kv: PagedKVCache) -> bool:
    """Run two tokens together and then one after the other: the second must have the same logits, up to rounding.

    Args:
        model: loaded.
        kv: a cache that nobody uses yet; its first blocks are written.
    """
    blocks = [tuple(range(-(-2 // kv.block_size)))]
    if blocks[0][-1] >= kv.tables.num_blocks:
        return True  # no room for two tokens: nothing can go wrong either

    def logits(ids: list[int], start: int) -> torch.Tensor:
        request = Request("probe", ids, SamplingParams(), 0, (), 1)
        step = Step((ScheduledRequest(request, start, len(ids) - start),))
        found: torch.Tensor = model(Batch.build(step, blocks, kv.block_size, kv.device), kv)
        return found[-1].float()

    together = logits([0, 1], 0)
    logits([0], 0)
    apart, alone = logits([0, 1], 1), logits([1], 0)
    return bool((apart - together).norm() <= 0.5 * (alone - together).norm())
