"""Attention by the paged kernels: plans a step's work once, launches once a layer for each kind of tile.

Everything is read from the cache, also the step's own tokens, which the layers have written by then. So a prompt, a
chunk and a decode differ in the length of their tiles only, and with a quantised cache every token is read as it will
be read later.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase3_paged_attention.work_list import Work

LEAST_TABLE = 512  # blocks, 8k tokens of pages of 16: captured steps have tables of a power of two, not fewer


def why_not_triton(spec: AttentionSpec, device: torch.device) -> list[str]:
    """Reasons why no Triton kernel runs for this layer on this device."""
    if importlib.util.find_spec("triton") is None:  # to import it takes a second
        return ["Triton is not installed (it is Linux only): pip install triton"]
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return [
            f"Triton's kernels need a GPU, not {device.type} (TRITON_INTERPRET=1 and float32 run them here, slowly)"
        ]
    if device.type != "cuda" and spec.dtype == torch.bfloat16:
        return ["Triton's interpreter is silently wrong for bfloat16: give --dtype float32"]
    return []


@dataclass(frozen=True)
class KernelPlan:
    """One step's work for all layers.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's key and value are written.
        tables: what the launches read beside q and the cache.
        work: for each window, one list for each kind of tile.
        shape: what a captured step is kept by; None: the step is not captured.
    """

    slots: tuple[Tensor, Tensor]
    tables: Any
    work: dict[int | None, tuple[Work, ...]]
    shape: tuple[int, ...] | None

    @property
    def sequences(self) -> tuple[()]:
        """Nobody needs this step's keys and values beside the cache."""
        return ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of a plan that has a shape."""
        t = self.tables
        lists = [x for works in self.work.values() for w in works for x in (w.items, w.merges, w.counters)]
        return (*self.slots, t.query_start, t.seq_lens, t.block_tables, *lists)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> KernelPlan:
        """The same plan with these."""
        tables = dataclasses.replace(self.tables, query_start=tensors[2], seq_lens=tensors[3], block_tables=tensors[4])
        rest = iter(tensors[5:])
        work = {
            window: tuple(
                dataclasses.replace(w, items=next(rest), merges=next(rest), counters=next(rest)) for w in works
            )
            for window, works in self.work.items()
        }
        return dataclasses.replace(self, slots=(tensors[0], tensors[1]), tables=tables, work=work)


class TritonAttention:
    """See `AttentionBackend`.

    Args:
        spec: of a layer; heads are alike in all of them.
        device: that the kernels run on.
        paged, work: the modules of kernel and planner: the solution's, the framework's or the learner's.
        fixed: whether lists and tables get sizes that depend on the number of sequences only.
    """

    def __init__(
        self, spec: AttentionSpec, device: torch.device, paged: ModuleType, work: ModuleType, fixed: bool = False
    ) -> None:
        self.spec, self.device, self.paged, self.work, self.fixed = spec, device, paged, work, fixed

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """No GPU, no Triton, or heads that the kernels have no tile for."""
        return why_not_triton(spec, device) or list(self.paged.why_not(spec, device))

    def steady(self, round_up: int) -> TritonAttention:
        """The same; lengths don't matter to a captured step, only the number of sequences does."""
        return TritonAttention(self.spec, self.device, self.paged, self.work, fixed=True)

    def plan(
        self,
        batch: Batch,
        windows: frozenset[int | None],
        block_size: int,
        visible: Tensor | None = None,
    ) -> KernelPlan:
        """Lists of work for short tiles (decodes) and for long ones, for each window.

        Args:
            batch, windows, block_size: see `AttentionBackend`.
            visible: [T] int64, see `Tables`; None: plainly causal.
        """
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        decode = max(batch.query_lens) == 1
        blocks = batch.block_tables
        if self.fixed:
            width = max(LEAST_TABLE, 1 << (blocks.shape[1] - 1).bit_length())
            blocks = torch.nn.functional.pad(blocks, (0, width - blocks.shape[1]))
        tables = self.paged.Tables(batch.query_start.int(), batch.seq_lens.int(), blocks.int(), visible)
        work = {window: self._work(batch, window) for window in windows}
        shape = None
        if self.fixed and decode and visible is None:
            shape = (batch.num_seqs, blocks.shape[1])
        return KernelPlan(slots, tables, work, shape)

    def run(
        self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, ...], plan: KernelPlan
    ) -> Tensor:
        """Attend to the cache; `k` and `v` are not read. See `AttentionBackend`."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for work in plan.work[spec.window]:
            self.paged.attend(
                q, kv, plan.tables, work, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap, out=out
            )
        return out.flatten(1)

    def _work(self, batch: Batch, window: int | None) -> tuple[Work, ...]:
        """One list for each length of tile that the batch's sequences want."""
        spec, device = self.spec, self.device
        by_tile: dict[int, list[int]] = {}
        for i, length in enumerate(batch.query_lens):
            by_tile.setdefault(self.paged.tokens_of(spec, device, length), []).append(i)
        return tuple(self._list(batch, window, tokens, members) for tokens, members in by_tile.items())

    def _list(self, batch: Batch, window: int | None, tokens: int, members: Sequence[int]) -> Work:
        spec, device = self.spec, self.device
        programs = self.paged.programs_of(spec, device, tokens)
        capacity = len(members) + -(-programs // spec.num_kv_heads) if self.fixed else None
        work: Work = self.work.plan_work(
            [batch.query_lens[i] for i in members],
            [batch.kv_lens[i] for i in members],
            sequences=members,
            group=spec.num_heads // spec.num_kv_heads,
            kv_heads=spec.num_kv_heads,
            window=window,
            programs=programs,
            block_n=self.paged.block_n_of(spec, device, tokens),
            tokens=tokens,
            capacity=capacity,
            device=device,
        )
        return work
