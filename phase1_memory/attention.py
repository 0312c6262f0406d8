"""Attention over blocks: phase 0's torch backend, reading through block tables.

Decodes of a batch gather their blocks into one tensor and go through one masked `scaled_dot_product_attention`; that
copies the cache once a layer and step, which is what phase 3's kernels avoid. A sequence whose blocks are neighbours is
read where it lies: that is one thing that runs of blocks are good for.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase0_prototype.attention import AttentionSpec, decode_mask, why_not_plain
from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_attention, causal_mask


@dataclass(frozen=True)
class Sequence:
    """A prompt or chunk in the flat batch.

    Attributes:
        start, end: its tokens in the batch.
        kv_len: its length, including what is in the cache.
        blocks: its block table on the device, [n] int64, or the first block where all are neighbours; None where
            nothing is in the cache before these tokens.
    """

    start: int
    end: int
    kv_len: int
    blocks: Tensor | int | None


@dataclass(frozen=True)
class PagedPlan:
    """One step's work: the first `num_decodes` sequences have one new token each, the rest are `sequences`.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's key and value are written.
        num_decodes: leading sequences of one token.
        blocks: of the decodes, [num_decodes, n] int64 (shorter tables are filled up with any block); the first block
            where there is one decode whose blocks are neighbours.
        masks: for each window, [num_decodes, 1, 1, n * page] bool, true where the token may be read; None for a single
            decode that reads exactly its own tokens.
        kv_len: tokens that the decodes read.
        sequences: the others.
        causal: for each (sequence, window) that needs one, [q, kv] bool; absent: plain causal from the first token.
    """

    slots: tuple[Tensor, Tensor]
    num_decodes: int
    blocks: Tensor | int
    masks: dict[int | None, Tensor | None]
    kv_len: int
    sequences: tuple[Sequence, ...]
    causal: dict[tuple[int, int | None], Tensor]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """What a captured step is kept by: plans of one shape differ in `tensors` only. None: has more than decodes."""
        return None if self.sequences else (self.num_decodes, self.kv_len)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of a plan of decodes that was made for few shapes (`round_up`)."""
        masks = [mask for mask in self.masks.values() if mask is not None]
        assert isinstance(self.blocks, Tensor) and len(masks) == len(self.masks)
        return (*self.slots, self.blocks, *masks)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> PagedPlan:
        """The same plan of decodes with these."""
        masks: dict[int | None, Tensor | None] = dict(zip(self.masks, tensors[3:], strict=True))
        return dataclasses.replace(self, slots=(tensors[0], tensors[1]), blocks=tensors[2], masks=masks)


class PagedTorchAttention:
    """`scaled_dot_product_attention` on gathered blocks; any device, any dtype.

    Args:
        round_up: decodes gather a multiple of this many tokens. A compiled or captured step needs few distinct lengths;
            eager steps read exactly the blocks that are there (1).
    """

    def __init__(self, round_up: int = 1) -> None:
        self.round_up = round_up

    def steady(self, round_up: int) -> PagedTorchAttention:
        """See `AttentionBackend`."""
        return PagedTorchAttention(round_up)

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Any device; torch's attention has no soft cap."""
        return why_not_plain(spec)

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int) -> PagedPlan:
        """Split the batch into decodes, which share one call, and sequences; build what layers share."""
        decodes = 0
        while decodes < batch.num_seqs and batch.query_lens[decodes] == 1 and batch.kv_lens[decodes] > 1:
            decodes += 1
        blocks: Tensor | int = 0
        masks: dict[int | None, Tensor | None] = {}
        kv_len = max(batch.kv_lens[:decodes], default=0)
        if decodes:
            pages = -(-kv_len // block_size)
            if self.round_up == 1 and decodes == 1 and neighbours(batch.blocks[0][:pages]):
                blocks = batch.blocks[0][0]
            else:
                pages = -(-(-(-kv_len // self.round_up) * self.round_up) // block_size)
                missing = max(0, pages - batch.block_tables.shape[1])
                blocks, kv_len = pad(batch.block_tables[:decodes, :pages], (0, missing)), pages * block_size
            exact = self.round_up == 1 and decodes == 1 and kv_len == batch.kv_lens[0]
            masks = {
                w: None if exact and (w is None or kv_len <= w) else decode_mask(batch.seq_lens[:decodes], kv_len, w)
                for w in windows
            }
        sequences: list[Sequence] = []
        causal: dict[tuple[int, int | None], Tensor] = {}
        start = decodes
        for i in range(decodes, batch.num_seqs):
            length, kv = batch.query_lens[i], batch.kv_lens[i]
            for w in windows:
                mask = causal_mask(length, kv, w, batch.token_ids.device)
                if mask is not None:
                    causal[len(sequences), w] = mask
            sequences.append(Sequence(start, start + length, kv, _past(batch, i, block_size)))
            start += length
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        return PagedPlan(slots, decodes, blocks, masks, kv_len, tuple(sequences), causal)

    def run(
        self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, Tensor], plan: PagedPlan
    ) -> Tensor:
        """Attend; the new keys and values are in the cache by now.

        Args:
            spec: the layer's shape.
            q: [T, Hq, D], rotated.
            k, v: [T, Hkv, D], k rotated: the new ones, for those whose past is empty.
            kv: the layer's cache, two of [blocks, page, Hkv, D].
            plan: of this step.

        Returns:
            [T, Hq * D].
        """
        if not plan.sequences:
            return _decode(spec, q, kv, plan)
        out = torch.empty_like(q).flatten(1)  # [T, Hq * D]
        if plan.num_decodes:
            out[: plan.num_decodes] = _decode(spec, q[: plan.num_decodes], kv, plan)
        for i, seq in enumerate(plan.sequences):
            rows = slice(seq.start, seq.end)
            if seq.blocks is None:
                key, value = k[rows], v[rows]
            else:
                key, value = (tokens_of(side, seq.blocks, seq.kv_len) for side in kv)
            mask = plan.causal.get((i, spec.window))
            attended = causal_attention(q[rows], key, value, spec.scale, spec.window, mask)
            out[rows] = attended.flatten(1)
        return out


def neighbours(blocks: tuple[int, ...]) -> bool:
    """Whether the blocks follow one another in memory."""
    return all(b - a == 1 for a, b in itertools.pairwise(blocks))


def _past(batch: Batch, i: int, block_size: int) -> Tensor | int | None:
    if batch.kv_lens[i] == batch.query_lens[i]:
        return None
    pages = -(-batch.kv_lens[i] // block_size)
    return batch.blocks[i][0] if neighbours(batch.blocks[i][:pages]) else batch.block_tables[i, :pages]


def tokens_of(side: Tensor, blocks: Tensor | int, kv_len: int) -> Tensor:
    """The first tokens of one sequence, [kv_len, Hkv, D]: a view where its blocks are neighbours, else a copy."""
    if isinstance(blocks, int):
        start = blocks * side.shape[1]
        return side.flatten(0, 1)[start : start + kv_len]
    return side[blocks].flatten(0, 1)[:kv_len]


def _decode(spec: AttentionSpec, q: Tensor, kv: tuple[Tensor, Tensor], plan: PagedPlan) -> Tensor:
    """One query token per sequence. Query heads that share a key head become rows of one small matrix product."""
    n = plan.num_decodes
    if isinstance(plan.blocks, int):
        key, value = (tokens_of(side, plan.blocks, plan.kv_len).unsqueeze(0) for side in kv)  # [1, kv, Hkv, D]
    else:
        key, value = (side[plan.blocks].flatten(1, 2) for side in kv)  # [B, kv, Hkv, D]
    out = sdpa(
        q.view(n, spec.num_kv_heads, -1, spec.head_dim),  # [B, Hkv, Hq/Hkv, D]
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=plan.masks[spec.window],
        scale=spec.scale,
    )
    return out.reshape(n, -1)
