"""Attention on a CPU: decodes by a kernel that reads pages where they lie, prompts by phase 3's way in torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase3_paged_attention.cached_attention import KV, Sequence, attend_sequence, sequences_of
from phase3_paged_attention.torch_attention import PagedTorchAttention
from phase4_scheduler.kernels import cpu
from phase4_scheduler.kernels.library import why_not_cpu_kernels


@dataclass(frozen=True)
class Plan:
    """One step's work.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's key and value are written.
        rows, tables, lengths: of the sequences of one token: their rows of q [S], blocks [S, n], tokens [S], all int64.
        sequences: the others.
    """

    slots: tuple[Tensor, Tensor]
    rows: Tensor
    tables: Tensor
    lengths: Tensor
    sequences: tuple[Sequence, ...]

    @property
    def shape(self) -> None:
        """Nothing of this plan repeats: it can't be captured."""
        return None


class CpuAttention(PagedTorchAttention):
    """The backend for CPUs; caches in 8 bits and trees go phase 3's way."""

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Reasons why these layers can't be attended to by the kernel."""
        reasons = []
        if device.type != "cpu":
            reasons.append(f"for CPUs, not {device.type}")
        elif why := why_not_cpu_kernels():
            reasons.append(why)
        if spec.dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"float32 and bfloat16, not {spec.dtype}")
        if spec.kv_cache_dtype != "auto":
            reasons.append(f"caches in the model's dtype, not {spec.kv_cache_dtype}")
        if spec.head_dim % cpu.MULTIPLE:
            reasons.append(f"heads of a multiple of {cpu.MULTIPLE} numbers, not {spec.head_dim}")
        return reasons

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int, visible: Tensor | None = None) -> Any:
        """Split the batch into decodes and sequences; arguments as in phase 3."""
        if visible is not None:
            return super().plan(batch, windows, block_size, visible)
        one = [i for i, n in enumerate(batch.query_lens) if n == 1]
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        if len(one) == batch.num_seqs:
            return Plan(slots, batch.query_start[:-1], batch.block_tables, batch.seq_lens, ())
        others = [i for i, n in enumerate(batch.query_lens) if n > 1]
        starts, which = list(accumulate(batch.query_lens, initial=0)), torch.tensor(one, dtype=torch.int64)
        rows = torch.tensor([starts[i] for i in one], dtype=torch.int64)
        sequences = sequences_of(batch, others, block_size, None)
        return Plan(slots, rows, batch.block_tables[which], batch.seq_lens[which], sequences)

    def run(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: KV, plan: Any) -> Tensor:
        """Attend; arguments as in phase 3.

        Returns:
            [T, Hq * D].
        """
        if not isinstance(plan, Plan):
            return super().run(spec, q, k, v, kv, plan)
        out = torch.empty(q.shape, dtype=q.dtype)  # [T, Hq, D]
        if len(plan.rows):
            both = (kv[0], kv[1])
            cpu.attend(q, both, plan.rows, plan.tables, plan.lengths, out, spec.scale, spec.window, spec.soft_cap)
        for seq in plan.sequences:
            rows = slice(seq.start, seq.end)
            out[rows] = attend_sequence(spec, q[rows], kv, seq, (k[rows], v[rows]))
        return out.flatten(1)
