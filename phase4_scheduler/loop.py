"""Turns scheduler and executor, one step ahead: the next step is decided and launched while this one runs.

    one after the other   | schedule 1 | run 1 | record 1, answer 1, schedule 2 | run 2 | ...
    one step ahead        | schedule 1 | run 1         | run 2         | run 3 ...
                                       | schedule 2    | record 1, answer 1, schedule 3

The device then never waits for Python, as long as deciding takes less time than running. What a step needs of the one
before it is the token that was chosen last, and that is on the device (executor.py). What the host does not know yet is
whether that token ends the request: then one row of the next step was computed for nothing, and its token is dropped.
(vLLM's `AsyncScheduler` and SGLang's overlap loop do the same.)

On a CPU nothing is gained: the threads that would run ahead are those that compute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phase0_prototype.request import Request
from phase0_prototype.step import NO_TOKEN, Step, StepTokens

if TYPE_CHECKING:
    from phase0_prototype.loop import Executes
    from phase4_scheduler.scheduler import Scheduler


@dataclass
class Counts:
    """What a loop has done since the start.

    Attributes:
        steps: forward passes.
        busy_seconds: in which one was on its way.
        seqs, tokens: sums over the steps.
        prompt_tokens: of these, tokens of prompts (again, where they were computed again).
        generated_tokens: tokens that were chosen and kept.
        longest_step: seconds; set it back when you have read it.
    """

    steps: int = 0
    busy_seconds: float = 0.0
    seqs: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    longest_step: float = 0.0


class Loop:
    """One step after the other. A request from whose logits no token can be chosen ends alone, with "error".

    Args:
        scheduler: decides.
        executor: computes.

    Attributes:
        counts: for statistics.
    """

    def __init__(self, scheduler: Scheduler, executor: Executes) -> None:
        self.scheduler, self.executor = scheduler, executor
        self.counts = Counts()
        self._span = _ranges()

    def has_unfinished(self) -> bool:
        """Whether a further `step` has work."""
        return self.scheduler.has_unfinished()

    def idle_for(self) -> float | None:
        """Seconds in which `step` would find nothing to do; 0: it would; None: not before another request comes."""
        return self.scheduler.idle_for()

    def step(self) -> StepTokens:
        """One forward pass; what it chose, and who ended without one."""
        with self._span("schedule"):
            step = self.scheduler.next_step()
        if not step.scheduled:
            return StepTokens(step)
        begin = time.perf_counter()
        try:
            done = self.executor.collect(self._launch(step, None))
        except BaseException:
            self.scheduler.failed([step])
            raise
        self._ran(time.perf_counter() - begin)
        return self._record(done, step.rejected)

    def _launch(self, step: Step, before: Any) -> Any:
        counts = self.counts
        counts.steps += 1
        counts.seqs += len(step.scheduled)
        counts.tokens += step.num_tokens
        for scheduled in step.scheduled:
            if scheduled.num_tokens > 1 or scheduled.start < len(scheduled.request.prompt_token_ids):
                counts.prompt_tokens += scheduled.num_tokens
        return self.executor.launch(step, before)

    def _ran(self, seconds: float) -> None:
        self.counts.busy_seconds += seconds
        self.counts.longest_step = max(self.counts.longest_step, seconds)

    def _record(self, done: StepTokens, rejected: tuple[Request, ...]) -> StepTokens:
        """Tell the scheduler; returns the step's tokens without those of requests that ended while it ran."""
        with self._span("finish"):
            alive = [(r, row) for r, row in zip(done.requests, done.rows, strict=True) if r.finish_reason is None]
            self.scheduler.finish(done.step, done.by_request())
            bad = tuple(r for r, row in alive if done.token_ids[row] == NO_TOKEN)
            kept = [(r, row) for r, row in alive if done.token_ids[row] != NO_TOKEN]
            self.counts.generated_tokens += len(kept)
        return replace(
            done,
            step=Step(done.step.scheduled, (*rejected, *bad)),
            requests=[r for r, _ in kept],
            rows=[row for _, row in kept],
        )


class AheadLoop(Loop):
    """One step ahead. `step` returns what the step before the newest has chosen, and nothing the first time."""

    def __init__(self, scheduler: Scheduler, executor: Executes) -> None:
        super().__init__(scheduler, executor)
        self._running: tuple[Step, Any] | None = None  # launched and not collected
        self._since = 0.0  # when the device was last known to begin something

    def has_unfinished(self) -> bool:
        """See `Loop`."""
        return self._running is not None or super().has_unfinished()

    def idle_for(self) -> float | None:
        """See `Loop`."""
        return 0.0 if self._running is not None else super().idle_for()

    def step(self) -> StepTokens:
        """Launch a step, then collect the one before it."""
        before, step, launched, done = self._running, Step(()), None, None
        try:
            if before is None or self.scheduler.may_run_ahead():
                with self._span("schedule"):
                    step = self.scheduler.next_step()
                if step.scheduled:
                    if before is None:
                        self._since = time.perf_counter()
                    launched = replace(step, rejected=()), self._launch(step, before and before[1])  # they are told now
            if before is not None:
                done = self.executor.collect(before[1])
        except BaseException:
            self._running = None
            self.scheduler.failed([before[0], step] if before else [step])
            raise
        self._running = launched
        if done is None:
            return StepTokens(Step((), step.rejected))
        now = time.perf_counter()
        self._ran(now - self._since)
        self._since = now
        return self._record(done, step.rejected)


def _ranges() -> Callable[[str], AbstractContextManager[object, None]]:
    """Named ranges for a profiler, where there is torch: an engine without a model has none."""
    if "torch" not in sys.modules:
        return lambda name: nullcontext()
    from module0_profiling.ranges import span

    return span
