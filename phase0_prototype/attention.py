"""Attention over the cache: the interface that every backend of the course implements, and the torch backend.

A backend plans once a step and runs once a layer. The torch backend is the oracle of all later kernels and the path for
CPUs: decodes of a batch go through one masked `scaled_dot_product_attention` over a slice of the cache; a prompt goes
through one causal call of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_attention, causal_mask


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer's attention needs from a backend. Hq query heads share Hkv key/value heads of D numbers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # tokens that a query sees, itself included; None: all
    soft_cap: float | None = None  # scores become cap * tanh(score / cap); None: they stay
    dtype: torch.dtype | None = None  # of queries; None: any
    kv_cache_dtype: str = "auto"  # how the cache keeps numbers; auto: as queries


class AttentionBackend(Protocol):
    """How attention is computed. The type of a plan is the backend's own business; `TorchAttention` has the shapes."""

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Reasons why this backend can't serve the model on this device; empty: it can."""
        ...

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int) -> Any:
        """What is the same for every layer of a step; `windows` are those that the model's layers use."""
        ...

    def run(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, Tensor], plan: Any) -> Tensor:
        """Attend with q [T, Hq, D], once the new k and v [T, Hkv, D] are in the cache; returns [T, Hq * D]."""
        ...

    def steady(self, round_up: int) -> AttentionBackend:
        """The same backend for steps that are compiled or captured: decodes read a multiple of `round_up` tokens."""
        ...


@dataclass(frozen=True)
class Sequence:
    """A prompt or chunk in the flat batch: its tokens `start..end`, its cache row, its length including the cache."""

    start: int
    end: int
    row: int
    kv_len: int


@dataclass(frozen=True)
class AttentionPlan:
    """One step's work: the first `num_decodes` sequences have one new token each, the rest are `sequences`.

    Attributes:
        slots: two of [T] int64, the cache row and the place in it where each token's key and value are written.
        num_decodes: leading sequences of one token whose rows are first_row, first_row + 1, ...
        kv_len: tokens of the cache that the decodes read (the longest of them, rounded up).
        masks: for each window, [num_decodes, 1, 1, kv_len] bool, true where the token may be read.
        sequences: the others.
        causal: for each (sequence, window) that needs one, [q, kv] bool; absent: plain causal from the first token.
    """

    slots: tuple[Tensor, Tensor]
    num_decodes: int
    first_row: int
    kv_len: int
    masks: dict[int | None, Tensor]
    sequences: tuple[Sequence, ...]
    causal: dict[tuple[int, int | None], Tensor]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """What a captured step is kept by: plans of one shape differ in `tensors` only. None: has more than decodes."""
        return None if self.sequences else (self.num_decodes, self.first_row, self.kv_len)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of a plan of decodes."""
        return (*self.slots, *self.masks.values())

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> AttentionPlan:
        """The same plan of decodes with these."""
        masks = dict(zip(self.masks, tensors[2:], strict=True))
        return dataclasses.replace(self, slots=(tensors[0], tensors[1]), masks=masks)


class TorchAttention:
    """`scaled_dot_product_attention` on slices of a contiguous cache; any device, any dtype.

    Args:
        round_up: decodes read a multiple of this many tokens. A compiled or captured step needs few distinct lengths;
            eager steps read exactly what is there (1).
    """

    def __init__(self, round_up: int = 1) -> None:
        self.round_up = round_up

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Any device; torch's attention has no soft cap."""
        return why_not_plain(spec)

    def steady(self, round_up: int) -> TorchAttention:
        """See `AttentionBackend`."""
        return TorchAttention(round_up)

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int) -> AttentionPlan:
        """Split the batch into decodes, which share one call, and sequences; build the masks that layers share."""
        rows = [b[0] for b in batch.blocks]
        decodes = 0
        while (
            decodes < batch.num_seqs and batch.query_lens[decodes] == 1 and rows[decodes] == rows[0] + decodes
        ):  # fmt: skip
            decodes += 1
        kv_len = 0
        masks: dict[int | None, Tensor] = {}
        if decodes:
            longest = max(batch.kv_lens[:decodes])
            kv_len = min(-(-longest // self.round_up) * self.round_up, block_size)
            masks = {w: decode_mask(batch.seq_lens[:decodes], kv_len, w) for w in windows}
        sequences: list[Sequence] = []
        causal: dict[tuple[int, int | None], Tensor] = {}
        start = decodes
        for i in range(decodes, batch.num_seqs):
            seq = Sequence(start, start + batch.query_lens[i], rows[i], batch.kv_lens[i])
            start = seq.end
            for w in windows:
                mask = causal_mask(seq.end - seq.start, seq.kv_len, w, batch.token_ids.device)
                if mask is not None:
                    causal[len(sequences), w] = mask
            sequences.append(seq)
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        return AttentionPlan(slots, decodes, rows[0] if rows else 0, kv_len, masks, tuple(sequences), causal)

    def run(
        self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, Tensor], plan: AttentionPlan
    ) -> Tensor:
        """Attend; the new keys and values are in the cache by now.

        Args:
            spec: the layer's shape.
            q: [T, Hq, D], rotated.
            k, v: [T, Hkv, D], k rotated: the new ones, for those whose past is empty.
            kv: the layer's cache, two of [rows, block_size, Hkv, D].
            plan: of this step.

        Returns:
            [T, Hq * D].
        """
        keys, values = kv
        if not plan.sequences:
            return _decode(spec, q, keys, values, plan)
        out = torch.empty_like(q).flatten(1)  # [T, Hq * D]
        if plan.num_decodes:
            out[: plan.num_decodes] = _decode(spec, q[: plan.num_decodes], keys, values, plan)
        for i, seq in enumerate(plan.sequences):
            mask = plan.causal.get((i, spec.window))
            if seq.kv_len == seq.end - seq.start:  # nothing in the cache before these tokens
                key, value = k[seq.start : seq.end], v[seq.start : seq.end]
            else:
                key, value = keys[seq.row, : seq.kv_len], values[seq.row, : seq.kv_len]
            attended = causal_attention(q[seq.start : seq.end], key, value, spec.scale, spec.window, mask)
            out[seq.start : seq.end] = attended.flatten(1)
        return out


def why_not_plain(spec: AttentionSpec) -> list[str]:
    """Reasons why plain softmax attention on unquantised keys and values would not be what the layer computes."""
    reasons = [] if spec.soft_cap is None else ["its scores are not capped"]
    return reasons if spec.kv_cache_dtype == "auto" else [*reasons, f"it reads no {spec.kv_cache_dtype} cache"]


def write_kv(keys: Tensor, values: Tensor, slots: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
    """Put new keys and values where they belong.

    Args:
        keys, values: the layer's cache, [rows, block_size, Hkv, D], changed in place and not through a view: that is
            what torch.compile keeps in place too, a view it would turn into a copy of the whole cache.
        slots: row and place in the row of each token, two of [T] int64.
        k, v: [T, Hkv, D].
    """
    keys.index_put_(slots, k)
    values.index_put_(slots, v)


def _decode(spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
    """One query token per sequence. Query heads that share a key head become rows of one small matrix product."""
    n, rows = plan.num_decodes, slice(plan.first_row, plan.first_row + plan.num_decodes)
    out = sdpa(
        q.view(n, spec.num_kv_heads, -1, spec.head_dim),  # [B, Hkv, Hq/Hkv, D]
        keys[rows, : plan.kv_len].transpose(1, 2),  # [B, Hkv, kv, D]
        values[rows, : plan.kv_len].transpose(1, 2),
        attn_mask=plan.masks[spec.window],
        scale=spec.scale,
    )
    return out.reshape(n, -1)


def decode_mask(seq_lens: Tensor, kv_len: int, window: int | None) -> Tensor:
    """[B, 1, 1, kv_len] bool: positions below the sequence's length and within the window of its last token."""
    position = torch.arange(kv_len, device=seq_lens.device)
    length = seq_lens.unsqueeze(1)
    mask = position < length
    if window is not None:
        mask &= position >= length - window
    return mask[:, None, None]
