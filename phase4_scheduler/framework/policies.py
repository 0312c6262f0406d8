"""Who goes first. A policy is an order of requests: the smallest key runs, the largest is preempted.

fcfs       arrival
priority   what the client says, then arrival
sjf        tokens of work that are left, prompt and answer: the shortest mean wait, and long requests starve
ageing     tokens of work, less `rate` for each second of waiting
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phase0_prototype.request import Request
from phase4_scheduler.scheduler_config import SchedulerConfig


@dataclass(frozen=True)
class Policy:
    """An order.

    Attributes:
        key: of a request; the smaller goes first, and arrival decides between equals.
        preemptive: a waiting request takes the place or the memory of running ones with larger keys.
        in_tokens: keys count tokens of work: who would have to compute more of them again than it is behind, stays.
    """

    key: Callable[[Request], float]
    preemptive: bool
    in_tokens: bool = False


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that the settings name."""
    # TASK 4.2: `config.scheduling_policy` says which of the four. A key is asked for when a request joins the queue,
    # and is not asked for again while it waits: how can ageing have one that stays right?
    return Policy(lambda request: request.arrival, preemptive=False)
