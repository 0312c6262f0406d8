"""Who goes first. A policy is an order of requests: the smallest key runs, the largest is preempted.

    fcfs       arrival
    priority   what the client says, then arrival
    sjf        tokens of work that are left, prompt and answer: the shortest mean wait, and long requests starve
    ageing     tokens of work, less `rate` for each second of waiting

Ageing does not have to be computed again and again. A request of work w that arrived at t has the key w - rate (now -
t); what two requests owe to `now` is the same, so w + rate t orders them alike, for ever. It follows that whoever
arrives later than t + w / rate can't go before it: its key is larger even with no work at all. So a request is passed
by no more than those that arrived by then, whoever comes afterwards (the bound that a test proves for every trace).
The idea is old: highest response ratio next (Brinch Hansen, 1971) ages by waiting / work instead.
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
    if config.scheduling_policy == "priority":
        return Policy(lambda request: request.priority, preemptive=True)
    if config.scheduling_policy == "sjf":
        return Policy(work_left, preemptive=True, in_tokens=True)
    if config.scheduling_policy == "ageing":
        rate = config.ageing_rate
        return Policy(lambda request: work(request) + rate * request.arrival, preemptive=True, in_tokens=True)
    return Policy(lambda request: request.arrival, preemptive=False)


def work(request: Request) -> int:
    """Tokens that a request needs in all, if it ends by length: prompt and answer."""
    return len(request.prompt_token_ids) + request.max_tokens


def work_left(request: Request) -> int:
    """Tokens that are left of it: of the prompt those not computed, of the answer those not chosen."""
    prompt = max(0, len(request.prompt_token_ids) - request.num_computed_tokens)
    return prompt + request.max_tokens - len(request.output_token_ids)
