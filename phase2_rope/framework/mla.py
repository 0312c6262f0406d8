"""Attention over latents as `transformers` computes it: every step makes keys and values of all cached tokens anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase1_memory.attention import PagedPlan, PagedTorchAttention, tokens_of
from phase2_rope.deepseek import LatentSpec
from phase2_rope.expanded import expanded


class PagedLatentAttention:
    """Latent attention on a paged cache whose entry is a token's latent and rotary key, [blocks, page, 1, L + R].

    It plans as `PagedTorchAttention` does.
    """

    def __init__(self, round_up: int = 1) -> None:
        self.paged = PagedTorchAttention(round_up)

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Nothing: it is given layers with latents only, on any device."""
        return []

    def steady(self, round_up: int) -> PagedLatentAttention:
        """See `AttentionBackend`."""
        return PagedLatentAttention(round_up)

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int) -> PagedPlan:
        """See `AttentionBackend`."""
        return self.paged.plan(batch, windows, block_size)

    def run(self, spec: LatentSpec, q: Tensor, entry: Tensor, up: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Attend; the step's entries are in the cache by now.

        Args:
            spec: the layer's shape.
            q: [T, H, P + R], the last R turned.
            entry: [T, L + R], latents and turned rotary keys of the step's own tokens.
            up: [H, P + V, L], what makes keys (the first P rows) and values from a latent.
            cache: [blocks, page, 1, L + R].
            plan: of this step.

        Returns:
            [T, H * V].
        """
        made = []
        for i in range(plan.num_decodes):
            blocks = plan.blocks if isinstance(plan.blocks, int) else plan.blocks[i]
            # TASK 2.3: one query, and W_UK and W_UV go through every token that it looks at. (q W_UK) c = q (W_UK c):
            # move them to the query's side, and let all sequences share one gather and one call.
            entries = tokens_of(cache, blocks, plan.kv_len)[:, 0]
            mask = None if plan.masks[None] is None else plan.masks[None][i, 0]
            made.append(expanded(spec, q[i : i + 1], entries, up, mask))
        for i, seq in enumerate(plan.sequences):
            entries = entry[seq.start : seq.end]
            if seq.blocks is not None:
                entries = tokens_of(cache, seq.blocks, seq.kv_len)[:, 0]
            # TASK 2.4: eight new tokens behind a thousand cached ones are no long prompt. Count the multiply-adds of
            # both forms for this many queries and keys, and take the lesser.
            made.append(expanded(spec, q[seq.start : seq.end], entries, up, plan.causal.get((i, None))))
        return torch.cat(made)
