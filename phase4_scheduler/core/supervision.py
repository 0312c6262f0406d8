"""What a supervisor is told about patience, and what it tells its client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from phase0_prototype.errors import UserError
from phase4_scheduler.core import wire
from phase4_scheduler.core.errors import EngineError

State = Literal["starting", "ready", "hung", "restarting", "broken", "stopping", "stopped"]


@dataclass(frozen=True)
class Supervision:
    """How patient a client is with its engine. Times in seconds.

    Attributes:
        start_timeout: from the start of a process to its `Hello`: weights are read, kernels compiled.
        hang_timeout: of silence, after which the engine counts as hung and takes no requests. Longer than most steps.
        hang_grace: more silence, after which it is killed. Longer than any step: the first ones may compile kernels.
        max_restarts: within `window`; the next death opens the breaker (restarts.py).
        window: in which a process proves itself.
        pause: before a process is tried again when the breaker is open; doubles up to `longest_pause`.
        longest_pause: see there.
        grace: between asking the engine to stop and killing it.
    """

    start_timeout: float = 1800.0
    hang_timeout: float = 30.0
    hang_grace: float = 90.0
    max_restarts: int = 3
    window: float = 300.0
    pause: float = 5.0
    longest_pause: float = 300.0
    grace: float = 3.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise UserError(f"{name}={value!r} is not allowed: give a number from 0")


class Listener(Protocol):
    """The client, as the supervisor sees it."""

    def on_ready(self) -> None:
        """A new engine takes requests."""

    def on_outputs(self, outputs: wire.Outputs) -> None:
        """The engine of now has made these."""

    def on_death(self, error: EngineError) -> None:
        """The engine of now is dead, and with it what it worked on. Another will come."""

    def on_broken(self, error: EngineError | UserError) -> None:
        """None will come soon, or ever."""
