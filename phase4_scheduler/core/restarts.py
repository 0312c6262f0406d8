"""When an engine that died is started again: at once, but not for ever. Pure logic; the clock is given."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class Breaker:
    """A circuit breaker (M. Nygard, "Release It!", 2007) for a process that keeps dying.

    Attributes:
        max_restarts: deaths within `window` that are answered by a restart at once; with the next it opens.
        window: seconds. A process that lives so long has proved itself: the pause begins anew.
        pause: seconds before the first probe when it is open; doubled with each that fails.
        longest_pause: seconds.
        open: whether there were too many deaths, and nothing has lived for `window` since.
    """

    max_restarts: int
    window: float
    pause: float
    longest_pause: float
    open: bool = False
    _deaths: deque[float] = field(default_factory=deque)
    _probes: int = 0

    def died(self, now: float, lived: float) -> float:
        """Record a death; returns the seconds to wait before the next start.

        Args:
            now: seconds of any clock that never goes back.
            lived: seconds for which it had been ready, 0 when it never was.
        """
        if lived >= self.window:
            self._deaths.clear()
            self.open, self._probes = False, 0
        self._deaths.append(now)
        while self._deaths[0] < now - self.window:
            self._deaths.popleft()
        if len(self._deaths) > self.max_restarts:
            self.open = True
        if not self.open:
            return 0.0
        wait = min(self.pause * 2.0**self._probes, self.longest_pause)
        self._probes = min(self._probes + 1, 64)
        return wait
