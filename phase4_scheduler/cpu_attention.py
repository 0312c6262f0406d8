"""Attention on a CPU by a kernel that reads pages where they lie: decodes, prompts and their pieces in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase3_paged_attention.cached_attention import KV
from phase3_paged_attention.torch_attention import PagedTorchAttention
from phase4_scheduler.kernels import cpu
from phase4_scheduler.kernels.library import why_not_cpu_kernels


@dataclass(frozen=True)
class Plan:
    """One step's work: what the batch says already.

    Attributes:
        slots: two of [T] int64, the block and the place in it where each token's key and value are written.
        starts, tables, lengths: of the sequences, see `cpu.attend`.
    """

    slots: tuple[Tensor, Tensor]
    starts: Tensor
    tables: Tensor
    lengths: Tensor

    sequences: ClassVar[tuple[()]] = ()  # none that go another way
    shape: ClassVar[None] = None  # nothing of this plan repeats: it can't be captured


class CpuAttention(PagedTorchAttention):
    """The backend for CPUs; trees go phase 3's way."""

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Reasons why these layers can't be attended to by the kernel."""
        reasons = []
        if device.type != "cpu":
            reasons.append(f"for CPUs, not {device.type}")
        elif why := why_not_cpu_kernels():
            reasons.append(why)
        if spec.dtype not in cpu.DTYPES:
            reasons.append(f"float32 and bfloat16, not {spec.dtype}")
        if spec.kv_cache_dtype != "auto":
            reasons.append(f"caches in the model's dtype, not {spec.kv_cache_dtype}")
        return reasons

    def plan(self, batch: Batch, windows: frozenset[int | None], block_size: int, visible: Tensor | None = None) -> Any:
        """See `Plan`; arguments as in phase 3."""
        if visible is not None:
            return super().plan(batch, windows, block_size, visible)
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        return Plan(slots, batch.query_start, batch.block_tables, batch.seq_lens)

    def run(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: KV, plan: Any) -> Tensor:
        """Attend; arguments as in phase 3.

        Returns:
            [T, Hq * D].
        """
        if not isinstance(plan, Plan):
            return super().run(spec, q, k, v, kv, plan)
        both = (kv[0], kv[1])
        out = cpu.attend(q, both, plan.starts, plan.tables, plan.lengths, spec.scale, spec.window, spec.soft_cap)
        return out.flatten(1)
