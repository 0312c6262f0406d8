"""Latent attention in its expanded form: make keys and values of every head, then attend as ever."""

from __future__ import annotations

from torch import Tensor

from phase0_prototype.prefill_attention import causal_attention
from phase2_rope.deepseek import LatentSpec

EXPANDED_BYTES = 256 << 20  # keys and values that are expanded at a time: heads are taken in groups that fit


def expanded(spec: LatentSpec, q: Tensor, entries: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of the last tokens of a sequence on every head's keys and values, made from the latents.

    Args:
        spec: the layer's shape.
        q: [Tq, H, P + R], the last Tq tokens of the sequence, their last R numbers turned.
        entries: [Tk, L + R], latent and turned rotary key of each token of the whole sequence.
        up: [H, P + V, L], what makes keys (the first P rows) and values from a latent.
        mask: [Tq, Tk] bool as `causal_mask` gives it, or None for what needs none.

    Returns:
        [Tq, H * V].
    """
    length, heads = entries.shape[0], spec.num_heads
    latents, shared = entries[:, : spec.latent], entries[:, spec.latent :]
    out = q.new_empty(q.shape[0], heads, spec.value)
    a_head = length * (2 * spec.nope + spec.rope + spec.value) * q.element_size()
    group = max(1, min(heads, EXPANDED_BYTES // a_head))
    for first in range(0, heads, group):
        some = slice(first, min(heads, first + group))
        made = (latents @ up[some].flatten(0, 1).T).unflatten(1, (-1, spec.nope + spec.value))  # [Tk, group, P + V]
        keys = q.new_empty(length, made.shape[1], spec.query)
        keys[..., : spec.nope] = made[..., : spec.nope]
        keys[..., spec.nope :] = shared.unsqueeze(1)
        out[:, some] = causal_attention(q[:, some], keys, made[..., spec.nope :], spec.scale, None, mask)
    return out.flatten(1)
