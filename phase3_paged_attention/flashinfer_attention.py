"""FlashInfer's kernels on our cache: the same pages, in the layout that it calls NHD (arXiv 2501.01005).

Optional: without the package, or without a GPU that it was written for, `why_not` says so. It plans a step on the host
for each window; captured steps are left to our own kernels (a plan has no shape).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase3_paged_attention.kv_format import FORMATS

HEAD_DIMS = (64, 128, 256)
WORKSPACE = 128 << 20  # bytes, as FlashInfer's documentation advises
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class FlashInferPlan:
    """One step: a planned wrapper for each window; decodes and prompts are rows of one call."""

    slots: tuple[Tensor, Tensor]
    wrappers: dict[int | None, Any]
    shape: None = None
    sequences: tuple[()] = ()


class FlashInferAttention:
    """See `AttentionBackend`.

    Args:
        spec: of a layer; heads are alike in all of them.
        device: a CUDA device.
        backend: FlashInfer's own choice of template: auto | fa2 | fa3.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device, backend: str = "auto") -> None:
        self.spec, self.device, self.backend = spec, device, backend
        self._wrappers: dict[tuple[int | None, bool], Any] = {}
        self._second = False

    def why_not(self, spec: AttentionSpec, device: torch.device) -> list[str]:
        """No GPU, no package, or a head, a number format or a window that it has no kernel for."""
        if device.type != "cuda":
            return [f"FlashInfer needs an NVIDIA GPU, not {device.type}"]
        if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            return ["FlashInfer needs a GPU of compute capability 8.0 or later"]
        if importlib.util.find_spec("flashinfer") is None:
            return ["flashinfer is not installed: pip install flashinfer-python"]
        reasons = []
        if spec.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"FlashInfer computes bfloat16 and float16, not {spec.dtype}")
        if spec.head_dim not in HEAD_DIMS:
            reasons.append(f"FlashInfer has kernels for heads of 64, 128 and 256, not {spec.head_dim}")
        if spec.kv_cache_dtype != "auto" and FORMATS[spec.kv_cache_dtype].per_token:
            reasons.append("FlashInfer has no scale for each token and head")
        return reasons

    def steady(self, round_up: int) -> FlashInferAttention:
        """Itself: its steps are not captured."""
        return self

    def plan(
        self, batch: Batch, windows: frozenset[int | None], block_size: int, visible: Tensor | None = None
    ) -> FlashInferPlan:
        """Plan each window's wrapper. Arguments as for `TritonAttention.plan`."""
        if visible is not None:
            raise NotImplementedError("masks of single tokens are for the triton backend")
        spec = self.spec
        self._second = not self._second  # a step has two plans at most: its own, and that of its last tokens
        pages = [-(-length // block_size) for length in batch.kv_lens]
        used = [block for blocks, n in zip(batch.blocks, pages, strict=True) for block in blocks[:n]]
        last = [length - (n - 1) * block_size for length, n in zip(batch.kv_lens, pages, strict=True)]
        for window in windows:
            self._wrapper(window).plan(
                _offsets(batch.query_lens),
                _offsets(pages),
                torch.tensor(used, dtype=torch.int32),
                torch.tensor(last, dtype=torch.int32),
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                block_size,
                causal=True,
                sm_scale=spec.scale,
                window_left=-1 if window is None else window - 1,
                logits_soft_cap=spec.soft_cap or 0.0,
                q_data_type=spec.dtype,
                kv_data_type=spec.dtype if spec.kv_cache_dtype == "auto" else FORMATS[spec.kv_cache_dtype].dtype,
            )
        slots = (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        return FlashInferPlan(slots, {window: self._wrapper(window) for window in windows})

    def run(
        self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, ...], plan: FlashInferPlan
    ) -> Tensor:
        """Attend to the cache; `k` and `v` are not read. See `AttentionBackend`."""
        wrapper, q = plan.wrappers[spec.window], q.contiguous()
        if len(kv) == 2:
            attended: Tensor = wrapper.run(q, kv)
        else:
            attended = wrapper.run(q, kv[:2], k_scale=kv[2], v_scale=kv[3])
        return attended.flatten(1)

    def _wrapper(self, window: int | None) -> Any:
        key = window, self._second
        if key not in self._wrappers:
            import flashinfer

            workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=self.device)
            self._wrappers[key] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=self.backend)
        return self._wrappers[key]


def _offsets(lengths: Any) -> Tensor:
    """[n + 1] int32 on the host: where each begins, and the end."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
