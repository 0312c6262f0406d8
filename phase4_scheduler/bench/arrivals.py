"""When requests are sent.

An open loop sends at given times whatever the server does, as independent users would; a closed loop keeps a number of
requests in flight and sends the next when one ends. An open loop finds where a server saturates; a closed loop can't
overload it, and measures how fast it is with so many at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from phase0_prototype.errors import UserError


@dataclass(frozen=True)
class Arrival:
    """How requests arrive. The terms are those of vLLM's benchmark.

    Attributes:
        rate: requests a second on average; infinite: as soon as allowed.
        burstiness: shape of the gamma distribution of the gaps. 1 is a Poisson process; below 1 they come in bursts,
            above 1 more evenly; infinite: at constant intervals. The coefficient of variation is burstiness ** -0.5.
        max_concurrency: requests in flight at most; None: any number.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise UserError(f"--request-rate {self.rate:g}: give a positive number of requests a second, or inf")
        if not self.burstiness > 0:
            raise UserError(f"--burstiness {self.burstiness:g}: give a positive number; 1 is Poisson, inf is constant")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise UserError(f"--max-concurrency {self.max_concurrency}: give at least 1")

    @classmethod
    def poisson(cls, rate: float) -> Arrival:
        """Independent users, `rate` requests a second."""
        return cls(rate)

    @classmethod
    def constant(cls, rate: float) -> Arrival:
        """One request every 1/rate seconds."""
        return cls(rate, math.inf)

    @classmethod
    def closed_loop(cls, concurrency: int) -> Arrival:
        """So many requests in flight at all times."""
        return cls(max_concurrency=concurrency)

    @property
    def open_loop(self) -> bool:
        """Whether requests have times of their own."""
        return not math.isinf(self.rate)

    def times(self, count: int, seed: int = 0) -> list[float]:
        """Seconds from the start at which each request is sent, ascending from 0."""
        if math.isinf(self.rate):
            return [0.0] * count
        if math.isinf(self.burstiness):
            return [i / self.rate for i in range(count)]
        rng = np.random.default_rng(seed)
        gaps = rng.gamma(self.burstiness, 1 / (self.rate * self.burstiness), max(0, count - 1))
        return [0.0, *np.cumsum(gaps).tolist()][:count]

    def __str__(self) -> str:
        if math.isinf(self.rate):
            return f"{self.max_concurrency} at a time" if self.max_concurrency else "all at once"
        kind = {1.0: "Poisson", math.inf: "constant"}.get(self.burstiness, f"gamma, burstiness {self.burstiness:g}")
        most = f", {self.max_concurrency} at a time at most" if self.max_concurrency else ""
        return f"{self.rate:g} requests/s ({kind}){most}"
