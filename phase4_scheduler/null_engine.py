"""An engine without a model or torch: `titan serve null`. Everything but the forward pass is the real thing."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.errors import UserError
from phase0_prototype.tokenizer import load_tokenizer
from phase1_memory.allocator import make_allocator
from phase4_scheduler.memory import CountedMemory, CountedSwap
from phase4_scheduler.null_executor import NullExecutor
from phase4_scheduler.scheduler_config import SchedulerConfig

if TYPE_CHECKING:
    from phase4_scheduler.loop import Loop

ROOM = __name__.rpartition(".")[0]
NULL = "null"  # the model's name
TEXT = "def greet(name):\n    return f'¡Hola, {name}! 你好 👋'\n\n\n"  # characters of one to four bytes
TOKENIZER = Path(__file__).resolve().parent.parent / "phase0_prototype" / "models" / "titan-tiny"


@dataclass(frozen=True)
class NullConfig:
    """Settings of an engine without a model.

    Attributes:
        step_seconds, token_seconds: how long a step takes, and each of its tokens more.
        max_model_len: longest sequence, prompt included.
        num_blocks, block_size: of the cache that is counted. None: `max_num_seqs` sequences of the longest length.
        swap_blocks: for preemption="swap".
        async_scheduling: one step ahead: on | off; auto is on.
        scheduling: of the scheduler.
    """

    step_seconds: float = 0.01
    token_seconds: float = 0.0
    max_model_len: int = 8192
    num_blocks: int | None = None
    block_size: int = 16
    swap_blocks: int = 0
    async_scheduling: str = "auto"
    scheduling: SchedulerConfig = field(default_factory=SchedulerConfig)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> NullConfig:
        """From flat settings, those of the scheduler among them.

        Raises:
            UserError: an unknown or impossible setting.
        """
        of_scheduler = {f.name for f in fields(SchedulerConfig)}
        own = {f.name for f in fields(cls)} - {"scheduling"}
        for name in settings:
            if name not in of_scheduler | own:
                near = difflib.get_close_matches(name, sorted(of_scheduler | own), n=1)
                remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(of_scheduler | own))}"
                raise UserError(f"{name!r} is not a setting of the model {NULL!r}: {remedy}")
        scheduling = SchedulerConfig(**{n: v for n, v in settings.items() if n in of_scheduler})
        return cls(**{n: v for n, v in settings.items() if n in own}, scheduling=scheduling)

    def __post_init__(self) -> None:
        for name in ("step_seconds", "token_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 3600:
                raise UserError(f"{name}={value!r} is not allowed: give seconds from 0")
        for name in ("max_model_len", "block_size", "num_blocks"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"{name}={value!r} is not allowed: give a positive integer")
        if self.num_blocks is not None and self.num_blocks * self.block_size < self.max_model_len:
            raise UserError(
                f"num_blocks={self.num_blocks} of {self.block_size} tokens don't hold one sequence of max_model_len="
                f"{self.max_model_len}: raise num_blocks or lower max_model_len"
            )
        if self.async_scheduling not in ("auto", "on", "off"):
            raise UserError(f"async_scheduling={self.async_scheduling!r} is not allowed: give auto, on or off")
        if isinstance(self.swap_blocks, bool) or not isinstance(self.swap_blocks, int) or self.swap_blocks < 0:
            raise UserError(f"swap_blocks={self.swap_blocks!r} is not allowed: give an integer from 0")

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        return self.num_blocks or self.scheduling.max_num_seqs * -(-self.max_model_len // self.block_size)


@dataclass(frozen=True)
class NullEngine:
    """What serves requests without computing anything.

    Attributes:
        loop: turns scheduler and executor.
        config: its settings.
        vocab_size, eos_token_ids: of the shipped model's tokenizer.
    """

    loop: Loop
    config: NullConfig
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()


def build_null(settings: dict[str, Any], use: Use | None = None) -> NullEngine:
    """Assemble it, of the parts that `use` says. Raises UserError for impossible settings."""
    config, use = NullConfig.of(settings), use or Use()
    loops = resolve(ROOM, "loop", use)
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer is not None, "the shipped model has a tokenizer"
    memory = CountedMemory(make_allocator(config.blocks), config.block_size)
    swap = CountedSwap(memory, config.swap_blocks) if config.scheduling.preemption == "swap" else None
    scheduler = resolve(ROOM, "scheduler", use).Scheduler(memory, config.scheduling, swap)
    executor = NullExecutor(config.step_seconds, config.token_seconds, tokenizer.encode(TEXT))
    loop = loops.Loop if config.async_scheduling == "off" else loops.AheadLoop
    return NullEngine(loop(scheduler, executor), config, tokenizer.vocab_size)
