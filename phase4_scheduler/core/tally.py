"""The engine's state at one moment, for the client: read from the loop's counts and the scheduler, now and then."""

from __future__ import annotations

from typing import Any

from phase4_scheduler.core import wire

_INTERVAL = 0.1  # seconds between two `Stats` while steps run: looking through a long queue costs as much as a step
_IDLE_INTERVAL = 0.5


class Tally:
    """Makes `Stats`.

    Args:
        loop: of this phase's engine.
        num_blocks: of the cache.
        started: when the engine was ready, on the clock of `now`.
    """

    def __init__(self, loop: Any, num_blocks: int, started: float) -> None:
        self.loop, self.num_blocks, self._started = loop, num_blocks, started
        self._told = float("-inf")

    def due(self, now: float, *, idle: bool = False) -> wire.Stats | None:
        """The state of things, unless it was told a moment ago."""
        if now - self._told < (_IDLE_INTERVAL if idle else _INTERVAL):
            return None
        self._told = now
        scheduler, counts = self.loop.scheduler, self.loop.counts
        swapped = scheduler.num_swapped
        longest, counts.longest_step = counts.longest_step, 0.0
        return wire.Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) - swapped,
            swapped=swapped,
            waiting_tokens=scheduler.backlog_tokens(),
            kv_blocks=self.num_blocks,
            kv_blocks_free=scheduler.kv.num_free,
            steps=counts.steps,
            busy_seconds=counts.busy_seconds,
            elapsed_seconds=now - self._started,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            preemptions=scheduler.preemptions,
            recomputed_tokens=scheduler.recomputed_tokens,
            batch_seqs=counts.seqs,
            batch_tokens=counts.tokens,
            largest_step_seconds=longest,
        )
