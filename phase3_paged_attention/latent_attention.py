"""Latent attention by the kernel: decodes and short chunks absorbed, where the entries lie; long prompts expanded.

Which form a sequence takes is phase 2's rule, `absorbing_is_less`. The plan makes it once a step: sequences that absorb
become rows of one batch of their own for the kernel, the others are read and expanded one by one as in phase 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate, chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_mask
from phase1_memory.attention import Sequence, tokens_of
from phase2_rope.deepseek import LatentSpec
from phase2_rope.expanded import expanded
from phase2_rope.mla import absorbing_is_less, into_latents, into_values
from phase3_paged_attention.attention import LEAST_TABLE, why_not_triton
from phase3_paged_attention.kernels.paged import Tables
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.packed_latents import Unpacking
from phase3_paged_attention.work_list import Work

TREE = 64  # new tokens of a sequence whose visibility `visible` can tell


@dataclass(frozen=True)
class LatentPlan:
    """One step's work: some sequences are the kernel's, the rest are `sequences`.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's entry is written.
        rows: tokens of the kernel's sequences; None: all, and there are no others.
        tables: of the kernel's sequences alone.
        work: one list for each kind of tile.
        sequences: those that are expanded.
        causal: for each of them that needs one, [q, kv] bool; absent: plain causal from the first token.
    """

    slots: tuple[Tensor, Tensor]
    rows: Tensor | None
    tables: Tables
    work: tuple[Work, ...]
    sequences: tuple[Sequence, ...]
    causal: dict[int, Tensor]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """What a captured step is kept by: plans of one shape differ in `tensors` only. None: it expands some."""
        if self.sequences:
            return None
        tables = (*self.slots[0].shape, *self.tables.block_tables.shape, self.tables.visible is not None)
        return (*tables, *chain.from_iterable((w.tokens, w.slots, len(w.items), len(w.merges)) for w in self.work))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of a plan that has a shape."""
        t = self.tables
        lists = chain.from_iterable((w.items, w.merges, w.counters) for w in self.work)
        visible = () if t.visible is None else (t.visible,)
        return (*self.slots, t.query_start, t.seq_lens, t.block_tables, *lists, *visible)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> LatentPlan:
        """The same plan with these."""
        rest = iter(tensors)
        slots = next(rest), next(rest)
        tables = dataclasses.replace(self.tables, query_start=next(rest), seq_lens=next(rest), block_tables=next(rest))
        work = tuple(
            dataclasses.replace(w, items=next(rest), merges=next(rest), counters=next(rest)) for w in self.work
        )
        tables = dataclasses.replace(tables, visible=next(rest, None))
        return dataclasses.replace(self, slots=slots, tables=tables, work=work)


class TritonLatentAttention:
    """Latent attention on a paged cache, as phase 2's `PagedLatentAttention`, with the decodes in a kernel.

    Args:
        spec: what a layer asks of its backend: type of the queries, and whether the cache is packed.
        device: that the kernel runs on.
        mla, work: the modules of kernel and planner: the solution's, the framework's or the learner's.
        latent: the shape of every layer.
        fixed: whether lists and tables get sizes that depend on the number of sequences only.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        device: torch.device,
        mla: ModuleType,
        work: ModuleType,
        latent: LatentSpec,
        fixed: bool = False,
    ) -> None:
        self.spec, self.device, self.mla, self.work, self.latent, self.fixed = spec, device, mla, work, latent, fixed
        self.dtype = spec.dtype or torch.float32
        packed = spec.kv_cache_dtype != "auto"
        self.packed = PackedLatents(latent.latent, latent.rope, self.dtype) if packed else None

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """No GPU, no Triton, or entries that the kernel has no tile for."""
        return why_not_triton(spec, device) or list(self.mla.why_not(self.latent.latent, self.latent.rope))

    def steady(self, round_up: int) -> TritonLatentAttention:
        """The same; lengths don't matter to a captured step, only the number of sequences does."""
        return TritonLatentAttention(self.spec, self.device, self.mla, self.work, self.latent, fixed=True)

    def plan(
        self, batch: Batch, windows: frozenset[int | None], block_size: int, visible: Tensor | None = None
    ) -> LatentPlan:
        """Deal the sequences out to the two forms, and cut the work of the kernel.

        Args:
            batch, windows, block_size: see `AttentionBackend`; there are no windows.
            visible: [T] int64, see `Tables`; None: plainly causal.
        """
        starts = (0, *accumulate(batch.query_lens))
        short = [i for i in range(batch.num_seqs) if self._absorbs(batch.query_lens[i], batch.kv_lens[i], visible)]
        sequences: list[Sequence] = []
        causal: dict[int, Tensor] = {}
        for i in sorted(set(range(batch.num_seqs)).difference(short)):
            length, kv_len = batch.query_lens[i], batch.kv_lens[i]
            blocks = None if length == kv_len else batch.block_tables[i, : -(-kv_len // block_size)]
            if (mask := causal_mask(length, kv_len, None, batch.token_ids.device)) is not None:
                causal[len(sequences)] = mask
            sequences.append(Sequence(starts[i], starts[i + 1], kv_len, blocks))
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        tables, rows = self._tables(batch, short, starts, visible)
        lengths = [(batch.query_lens[i], batch.kv_lens[i]) for i in short]
        return LatentPlan(slots, rows, tables, self._work(lengths), tuple(sequences), causal)

    def run(self, spec: LatentSpec, q: Tensor, entry: Tensor, up: Tensor, cache: Tensor, plan: LatentPlan) -> Tensor:
        """Attend; the step's entries are in the cache by now.

        Args:
            spec: the layer's shape.
            q: [T, H, P + R], the last R turned.
            entry: [T, L + R], what the cache says of the step's own tokens; decodes don't ask for it.
            up: [H, P + V, L], what makes keys (the first P rows) and values from a latent.
            cache: [blocks, page, 1, L + R], or packed.
            plan: of this step.

        Returns:
            [T, H * V].
        """
        if plan.rows is None:
            return self._absorbed(spec, q, up, cache, plan)
        out = q.new_empty(q.shape[0], spec.num_heads * spec.value)
        if plan.work:
            out[plan.rows] = self._absorbed(spec, q[plan.rows], up, cache, plan)
        side: Any = cache if self.packed is None else Unpacking(cache, self.packed)
        for i, seq in enumerate(plan.sequences):
            rows = slice(seq.start, seq.end)
            entries = entry[rows] if seq.blocks is None else tokens_of(side, seq.blocks, seq.kv_len)[:, 0]
            out[rows] = expanded(spec, q[rows], entries, up, plan.causal.get(i))
        return out

    def _absorbed(self, spec: LatentSpec, q: Tensor, up: Tensor, cache: Tensor, plan: LatentPlan) -> Tensor:
        absorbed = into_latents(spec, q, up)  # [T, H, L + R]
        out = q.new_empty(q.shape[0], spec.num_heads, spec.latent)
        for work in plan.work:
            self.mla.attend_latents(
                absorbed, cache, plan.tables, work, scale=spec.scale, latent=spec.latent, rope=spec.rope, out=out
            )
        return into_values(spec, out, up)

    def _absorbs(self, queries: int, keys: int, visible: Tensor | None) -> bool:
        """Trees are the kernel's in any case: no mask of the other form has them. So are single tokens."""
        if queries == 1 or (visible is not None and queries <= TREE):
            return True
        return absorbing_is_less(self.latent, queries, keys)

    def _tables(
        self, batch: Batch, short: list[int], starts: tuple[int, ...], visible: Tensor | None
    ) -> tuple[Tables, Tensor | None]:
        """Tables of these sequences, and their tokens' rows where these are not all."""
        blocks, query_start, seq_lens, rows = batch.block_tables, batch.query_start, batch.seq_lens, None
        if len(short) < batch.num_seqs:
            device = blocks.device
            flat = list(chain.from_iterable(range(starts[i], starts[i + 1]) for i in short))
            ends = list(accumulate((batch.query_lens[i] for i in short), initial=0))
            chosen = torch.tensor([*short, *flat, *ends]).to(device, non_blocking=True)
            which, rows, query_start = chosen.split([len(short), len(flat), len(ends)])
            blocks, seq_lens = blocks[which], seq_lens[which]
            visible = None if visible is None else visible[rows]
        if self.fixed:
            width = max(LEAST_TABLE, 1 << (blocks.shape[1] - 1).bit_length())
            blocks = torch.nn.functional.pad(blocks, (0, width - blocks.shape[1]))
        return Tables(query_start.int(), seq_lens.int(), blocks.int(), visible), rows

    def _work(self, lengths: SequenceOf[tuple[int, int]]) -> tuple[Work, ...]:
        """One list for each length of tile that sequences of so many new and cached tokens want."""
        by_cut: dict[Any, list[int]] = {}
        for i, (queries, _) in enumerate(lengths):
            cut = self.mla.cut_for(self.latent.num_heads, queries, self.dtype, self.packed is not None, self.device)
            by_cut.setdefault(cut, []).append(i)
        return tuple(
            self.work.plan_work(
                [lengths[i][0] for i in members],
                [lengths[i][1] for i in members],
                sequences=members,
                group=cut.group,
                kv_heads=cut.head_tiles,
                window=None,
                programs=cut.programs,
                block_n=cut.block_n,
                tokens=cut.tokens,
                capacity=len(members) + -(-cut.programs // cut.head_tiles) if self.fixed else None,
                device=self.device,
            )
            for cut, members in by_cut.items()
        )
