"""A scheduler on a clock that only steps move, for gates: no machine changes what it does. Whose it is, a `Use` says.

The cache counts and holds nothing, and the model is a rule: an answer ends with its end token after as many tokens as
it was told, or because it may have no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import Step
from phase1_memory.allocator import make_allocator
from phase4_scheduler.memory import CountedMemory
from phase4_scheduler.scheduler_config import SchedulerConfig

ROOM = "phase4_scheduler"
PAGE = 16
TOKEN, END = 1, 0
TOO_LONG = 100_000  # steps: nothing that is measured here needs a tenth


@dataclass(frozen=True)
class Arrival:
    """A request that comes.

    Attributes:
        at: seconds.
        prompt, answer: tokens.
        most: `max_tokens`; 0: as long as the answer is.
        priority: smaller is more urgent.
    """

    at: float
    prompt: int
    answer: int
    most: int = 0
    priority: int = 0


class Simulated:
    """A scheduler and what became of its requests.

    Args:
        use: whose scheduler, and whose policies.
        settings: of `SchedulerConfig`.
        num_blocks: of the cache.
        step_seconds, token_seconds: what a step takes, and each of its tokens more.

    Attributes:
        now: seconds.
        steps: with something in them.
        begun: when each step began.
        requests: in the order of their arrivals; their ids count from 0.
        sampled: by request id, the number of each step that gave it a token.
        first, last: by request id, when it had its first token and its last.
    """

    def __init__(
        self,
        use: Use,
        settings: dict[str, Any],
        *,
        num_blocks: int = 100_000,
        step_seconds: float = 1.0,
        token_seconds: float = 0.0,
    ) -> None:
        self.now = 0.0
        memory = CountedMemory(make_allocator(num_blocks, kind="python"), PAGE)
        config = SchedulerConfig(**settings)
        self.scheduler = resolve(ROOM, "scheduler", use).Scheduler(memory, config, None, lambda: self.now)
        self.step_seconds, self.token_seconds = step_seconds, token_seconds
        self.steps: list[Step] = []
        self.begun: list[float] = []
        self.requests: list[Request] = []
        self.sampled: dict[str, list[int]] = {}
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._answers: dict[str, int] = {}

    def add(self, arrival: Arrival) -> Request:
        """Queue a request."""
        name, most = str(len(self.requests)), arrival.most or arrival.answer
        request = Request(
            name,
            [TOKEN] * arrival.prompt,
            SamplingParams(max_tokens=most),
            0,
            (END,),
            most,
            group=name,
            priority=arrival.priority,
            arrival=arrival.at,
        )
        self.requests.append(request)
        self.sampled[name], self._answers[name] = [], arrival.answer
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        """One step, after which the clock says when it is over."""
        step: Step = self.scheduler.next_step()
        if not step.scheduled:
            return
        self.begun.append(self.now)
        self.now += self.step_seconds + self.token_seconds * step.num_tokens
        for request in step.sampling:
            self.sampled[request.request_id].append(len(self.steps))
            self.first.setdefault(request.request_id, self.now)
        self.steps.append(step)
        getting = {request.request_id for request in step.sampling}
        ended = self.scheduler.finish(
            step, [[self._token(r)] if r.request_id in getting else [] for r in step.requests]
        )
        self.last |= {request.request_id: self.now for request in ended}

    def run(self, arrivals: Iterable[Arrival], until: Callable[[], bool] = lambda: False) -> None:
        """Turn until all have come and gone, or `until` says so, which is asked before each step.

        Raises:
            AssertionError: it does not end.
        """
        coming = sorted(arrivals, key=lambda arrival: arrival.at)
        while not until():
            while coming and coming[0].at <= self.now:
                self.add(coming.pop(0))
            idle = self.scheduler.idle_for()
            if idle == 0.0:
                self.step()
                assert len(self.steps) < TOO_LONG, f"{len(self.scheduler.running)} requests run and never end"
                continue
            if idle is None and not coming:
                return
            waits = [] if idle is None else [self.now + idle]
            self.now = max(self.now, min([*waits, *(arrival.at for arrival in coming[:1])]))

    def waits(self) -> list[float]:
        """Seconds from the arrival of each request to the step that gave it its first token."""
        return [self.first[r.request_id] - self.step_seconds - r.arrival for r in self.requests]

    def _token(self, request: Request) -> int:
        return END if len(request.output_token_ids) + 1 >= self._answers[request.request_id] else TOKEN
