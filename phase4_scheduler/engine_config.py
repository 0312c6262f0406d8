"""Settings of the engine that serves: those of phase 3 and the scheduler's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from phase0_prototype.engine_config import resolve_device
from phase0_prototype.errors import UserError
from phase3_paged_attention.engine_config import BACKENDS, AttentionConfig
from phase4_scheduler.scheduler_config import SchedulerConfig

BUDGETS = {"cuda": 2048, "cpu": 256}  # tokens of a step: enough to keep the matrix units busy, and no more to wait for


@dataclass(frozen=True)
class ServingConfig(AttentionConfig):
    """See `AttentionConfig` and `SchedulerConfig`, whose fields these are; differences:

    Attributes:
        max_num_batched_tokens: 0 chooses by device: 2048 on CUDA, 256 elsewhere.
        async_scheduling: one step ahead (loop.py): on | off | auto (on for CUDA).
        attention_backend: also cpu, the kernel of cpu_attention.py.
        cpu_kernels: those of kernels/ on a CPU: on | off | auto (where they can be built).
    """

    backends: ClassVar[tuple[str, ...]] = ("auto", "cpu", *BACKENDS[1:])

    max_num_batched_tokens: int = 0
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    step_priority: str = "decode"
    scheduling_policy: str = "fcfs"
    ageing_rate: float = 100.0
    batch_size: int = 8
    batch_wait: float = 0.0
    async_scheduling: str = "auto"
    cpu_kernels: str = "auto"

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens == 0:
            device = resolve_device(self.device).type
            object.__setattr__(self, "max_num_batched_tokens", BUDGETS.get(device, BUDGETS["cpu"]))
        super().__post_init__()
        for name in ("async_scheduling", "cpu_kernels"):
            if (value := getattr(self, name)) not in ("auto", "on", "off"):
                raise UserError(f"{name}={value!r} is not allowed: give auto, on or off")
        _ = self.scheduling  # checks what it is made of

    @property
    def scheduling(self) -> SchedulerConfig:
        """The scheduler's part."""
        own = {f.name for f in fields(self)} - {"max_num_seqs"}
        shared = {f.name: getattr(self, f.name) for f in fields(SchedulerConfig) if f.name in own}
        return SchedulerConfig(max_num_seqs=self.max_seqs, **shared)
