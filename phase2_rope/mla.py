"""Attention over latents: the cache holds 576 numbers a token where heads of their own would fill 40,960.

A head's key is W_UK c and its value W_UV c, c the token's latent; beside it one rotary key is shared by all heads. The
same scores come out in two ways (DeepSeek-V2, arXiv 2405.04434, section 2.1.2 and appendix C):

    expanded   make every head's keys and values from the latents, then plain attention of width P + R
    absorbed   q W_UK once a query, then all heads attend to the latents themselves: one "key head" of width L + R whose
               values are its own first L numbers, and W_UV once a query behind it

Expanding costs work for each cached token, absorbing makes each pair of query and key dearer (L + R and L numbers
instead of P + R and V). A decode has one query for all its cached tokens, a prompt as many as keys: `absorbing_is_less`
decides for each sequence of a step by the FLOPs of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_attention
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
        if not plan.sequences:
            return _decode(spec, q, up, cache, plan)
        out = q.new_empty(q.shape[0], spec.num_heads * spec.value)
        if plan.num_decodes:
            out[: plan.num_decodes] = _decode(spec, q[: plan.num_decodes], up, cache, plan)
        for i, seq in enumerate(plan.sequences):
            rows = slice(seq.start, seq.end)
            entries = entry[rows] if seq.blocks is None else tokens_of(cache, seq.blocks, seq.kv_len)[:, 0]
            attend = absorbed if absorbing_is_less(spec, seq.end - seq.start, seq.kv_len) else expanded
            out[rows] = attend(spec, q[rows], entries, up, plan.causal.get((i, None)))
        return out


def absorbing_is_less(spec: LatentSpec, queries: int, keys: int) -> bool:
    """Whether the absorbed form needs fewer FLOPs for the last `queries` of a sequence of `keys` tokens.

    With many keys behind few queries that is so up to L (P + V) / (2 L - P - V) queries: 171 for DeepSeek-V3.
    """
    pairs = queries * keys - queries * (queries - 1) // 2
    through = spec.latent * (spec.nope + spec.value)  # multiply-adds of W_UK and W_UV for one token and head
    return queries * through + pairs * (spec.entry + spec.latent) < keys * through + pairs * (spec.query + spec.value)


def absorbed(spec: LatentSpec, q: Tensor, entries: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of the last tokens of a sequence on the latents themselves.

    Args:
        spec, q, entries, up, mask: as for `expanded`.

    Returns:
        [Tq, H * V].
    """
    keys = entries.unsqueeze(1)  # one key head for all query heads
    attended = causal_attention(into_latents(spec, q, up), keys, keys, spec.scale, None, mask)  # [Tq, H, L + R]
    return into_values(spec, attended, up)


def _decode(spec: LatentSpec, q: Tensor, up: Tensor, cache: Tensor, plan: PagedPlan) -> Tensor:
    """One query token per sequence: its heads are the rows of one product with the sequence's entries."""
    if isinstance(plan.blocks, int):
        entries = tokens_of(cache, plan.blocks, plan.kv_len).transpose(0, 1).unsqueeze(0)  # [1, 1, kv, L + R]
    else:
        entries = cache[plan.blocks].flatten(1, 2).transpose(1, 2)  # [B, 1, kv, L + R]
    attended = sdpa(
        into_latents(spec, q, up).unsqueeze(1),  # [B, 1, H, L + R]
        entries,
        entries,
        attn_mask=plan.masks[None],
        scale=spec.scale,
    )
    return into_values(spec, attended[:, 0], up)


def into_latents(spec: LatentSpec, q: Tensor, up: Tensor) -> Tensor:
    """Queries that meet latents: [T, H, P + R] -> [T, H, L + R], W_UK absorbed."""
    nope = torch.bmm(q[..., : spec.nope].transpose(0, 1), up[:, : spec.nope])  # [H, T, L]
    return torch.cat((nope.transpose(0, 1), q[..., spec.nope :]), dim=-1)


def into_values(spec: LatentSpec, attended: Tensor, up: Tensor) -> Tensor:
    """Sums of latents to sums of values, [T, H, >= L] -> [T, H * V]; what lies behind the latent is dropped."""
    latents = attended[..., : spec.latent].transpose(0, 1)  # [H, T, L]
    return torch.bmm(latents, up[:, spec.nope :].transpose(1, 2)).transpose(0, 1).flatten(1)
