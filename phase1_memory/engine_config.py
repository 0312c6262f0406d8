"""Settings of the engine with a paged cache: those of phase 0 and what memory adds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase0_prototype.engine_config import EngineConfig
from phase0_prototype.errors import UserError

PRESSURES = ("recompute", "swap", "reject")
ALLOCATORS = ("auto", "python", "rust")
GIB = 1 << 30


@dataclass(frozen=True)
class PagedConfig(EngineConfig):
    """See `EngineConfig`; max_num_seqs is 256 by default, for nothing is reserved for a sequence that is not there.

    Attributes:
        block_size: tokens in a block of the cache.
        num_blocks: blocks of the cache; one more is allocated, for padded rows. None: from kv_cache_memory_bytes, or as
            many as fit.
        kv_cache_memory_bytes: bytes of the cache. None: on CUDA what gpu_memory_utilization leaves, on a CPU at most
            half of the free memory.
        gpu_memory_utilization: share of a CUDA device's memory that the engine may use, weights included.
        watermark: share of the blocks that admission leaves free for what already runs.
        preemption: when blocks run out: recompute | swap | reject.
        swap_bytes: main memory for swapped sequences.
        offload_dir: directory of a file for swapped sequences that main memory does not hold; None: no file.
        offload_bytes: size of that file.
        allocator: auto | python | rust.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    watermark: float = 0.01
    preemption: str = "recompute"
    swap_bytes: int = GIB
    offload_dir: str | Path | None = None
    offload_bytes: int = 4 * GIB
    allocator: str = "auto"

    @property
    def max_seqs(self) -> int:
        """Sequences that run together at most."""
        return self.max_num_seqs or 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("block_size", self.block_size, _whole(self.block_size, 1), "a positive integer")
        for name in ("num_blocks", "kv_cache_memory_bytes"):
            _require(name, value := getattr(self, name), value is None or _whole(value, 1), "a positive integer")
        for name in ("swap_bytes", "offload_bytes"):
            _require(name, value := getattr(self, name), _whole(value, 0), "a number of bytes, 0 or more")
        share = self.gpu_memory_utilization
        _require("gpu_memory_utilization", share, _number(share) and 0 < share <= 1, "a number above 0, at most 1")
        share = self.watermark
        _require("watermark", share, _number(share) and 0 <= share < 1, "a number from 0, below 1")
        for name, known in (("preemption", PRESSURES), ("allocator", ALLOCATORS)):
            _require(
                name, value := getattr(self, name), value in known, " or ".join((", ".join(known[:-1]), known[-1]))
            )
        path = self.offload_dir
        _require("offload_dir", path, path is None or isinstance(path, str | Path), "a directory or None")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise UserError("num_blocks and kv_cache_memory_bytes both say how large the cache is: give one of them")
        if self.offload_dir is not None and self.preemption != "swap":
            raise UserError(f"offload_dir={self.offload_dir!r} is for preemption='swap', not {self.preemption!r}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(name: str, value: Any, fine: bool, what: str) -> None:
    if not fine:
        raise UserError(f"{name}={value!r} is not allowed: give {what}")
