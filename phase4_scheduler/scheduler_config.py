"""How a scheduler is set up: plain data, no torch, so that a simulation and an engine without a model can use it."""

from __future__ import annotations

from dataclasses import dataclass

from phase0_prototype.errors import UserError

POLICIES = ("fcfs", "priority", "sjf", "ageing")
PRIORITIES = ("decode", "prefill")
PRESSURES = ("recompute", "swap", "reject")


@dataclass(frozen=True)
class SchedulerConfig:
    """Settings of a scheduler, in vLLM's names where it has them.

    Attributes:
        max_num_seqs: sequences that run together at most.
        max_num_batched_tokens: tokens of a step at most, prompts and decodes together.
        enable_chunked_prefill: a prompt may be computed in pieces. False: whole, in a step of its own if it is longer
            than the budget; one that does not fit beside the tokens of those that generate waits until they have ended,
            and all who come after it wait, too.
        long_prefill_token_threshold: most tokens of one prompt in a step; 0: the budget is the only limit.
        step_priority: what a step takes first: "decode" keeps tokens flowing, "prefill" begins answers sooner.
        scheduling_policy: fcfs | priority | sjf | ageing (policies.py).
        ageing_rate: for "ageing": tokens of work that a second of waiting is worth.
        preemption: when blocks run out: recompute | swap | reject.
        watermark: share of the blocks that admission leaves free, so that what runs can grow for a while.
        batch_size, batch_wait: dynamic batching. An idle engine holds requests back until so many wait, or until the
            first has waited so many seconds; 0 seconds: never.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    step_priority: str = "decode"
    scheduling_policy: str = "fcfs"
    ageing_rate: float = 100.0
    preemption: str = "recompute"
    watermark: float = 0.01
    batch_size: int = 8
    batch_wait: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "batch_size"):
            _whole(name, getattr(self, name), 1)
        _whole("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        for name in ("ageing_rate", "batch_wait", "watermark"):
            _number(name, getattr(self, name))
        for name, known in (
            ("scheduling_policy", POLICIES),
            ("step_priority", PRIORITIES),
            ("preemption", PRESSURES),
            ("enable_chunked_prefill", (True, False)),
        ):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name}={value!r} is not allowed: give {' or '.join(map(str, known))}")
        if self.scheduling_policy == "ageing" and self.ageing_rate <= 0:
            raise UserError(f"ageing_rate={self.ageing_rate!r} would never let a long request in: give more than 0")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r} is not allowed: give an integer from {least}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UserError(f"{name}={value!r} is not allowed: give a number from 0")
