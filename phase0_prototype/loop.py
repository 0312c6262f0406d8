"""One step after the other: decide, run, record. (Phase 4 decides the next while this one runs.)"""

from __future__ import annotations

from typing import Any, Protocol

from module0_profiling.ranges import span
from phase0_prototype.request import Request
from phase0_prototype.step import Step, StepTokens, insist


class Schedules(Protocol):
    """What a loop asks of a scheduler."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def has_unfinished(self) -> bool:
        """Whether a further step has work."""

    def next_step(self) -> Step:
        """What to run now."""

    def finish(self, step: Step, tokens: list[list[int]]) -> list[Request]:
        """Record what a step computed; returns the requests that ended."""

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now."""


class Executes(Protocol):
    """What a loop asks of an executor (executor.py)."""

    def launch(self, step: Step, before: Any = None) -> Any:
        """Begin a step."""

    def collect(self, launched: Any) -> StepTokens:
        """Wait for it."""


class Loop:
    """Turns a scheduler and an executor.

    Args:
        scheduler: decides.
        executor: computes.
    """

    def __init__(self, scheduler: Schedules, executor: Executes) -> None:
        self.scheduler, self.executor = scheduler, executor

    def has_unfinished(self) -> bool:
        """Whether a further `step` has work."""
        return self.scheduler.has_unfinished()

    def step(self) -> StepTokens:
        """One forward pass.

        Raises:
            SamplingError: no token can be chosen for a request; the step counts as not run.
        """
        with span("schedule"):
            step = self.scheduler.next_step()
        if not step.scheduled:  # nothing to run, and somebody to tell
            self.scheduler.finish(step, [])
            return StepTokens(step)
        done = self.executor.collect(self.executor.launch(step))
        insist(done.token_ids, [request.request_id for request in done.requests])
        with span("finish"):
            self.scheduler.finish(step, done.by_request())
        return done
