"""A real engine whose loop is turned by hand: requests come, go and are late at any time, and every token is noted."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import Step, StepTokens


class Turned:
    """Tokens in, tokens out.

    Args:
        llm: whose engine it is; nothing else may use it meanwhile.

    Attributes:
        shown: by request, the tokens that came out.
        told: in the order in which their ends came out.
    """

    def __init__(self, llm: Any) -> None:
        self.engine, self.loop, self.scheduler = llm.engine, llm.engine.loop, llm.engine.scheduler
        self.shown: defaultdict[Request, list[int]] = defaultdict(list)
        self.told: list[Request] = []
        self._count = 0

    def add(self, prompt: Sequence[int], params: SamplingParams, **more: Any) -> Request:
        """Queue a sequence; `more` are attributes of `Request`; `patience` is its deadline in seconds from now."""
        self._count += 1
        if (patience := more.pop("patience", None)) is not None:
            more["deadline"] = time.monotonic() + patience
        seed, most = params.seed or 0, params.max_tokens or 16
        request = Request(f"turned-{self._count}", list(prompt), params, seed, (), most, **more)
        self.scheduler.add(request)
        return request

    def step(self) -> StepTokens:
        """Turn the loop once."""
        done = self.loop.step()
        for request, row in zip(done.requests, done.rows, strict=True):
            self.shown[request].append(done.token_ids[row])
        for request in (*done.requests, *done.step.rejected):
            if request.finish_reason is not None:
                assert request not in self.told, "told twice"
                self.told.append(request)
        return done

    def run(self) -> None:
        """To the end; nothing may be left then."""
        while self.loop.has_unfinished():
            self.step()
        kv = self.engine.kv
        assert kv.num_free == kv.tables.num_blocks and not kv.tables.tables, "blocks leaked"
        swap = getattr(self.scheduler, "swap", None)
        assert swap is None or not swap.store._entries, "a swapped sequence was forgotten"
        assert all(self.shown[request] == request.output_token_ids for request in self.told)


class Watched:
    """An executor that notes what it is given, and fails when told to.

    Args:
        executor: the real one.

    Attributes:
        steps: all that were launched.
        ahead: for each, whether another was on its way.
        failing: "", or where the next step fails: "launch" or "collect".
    """

    def __init__(self, executor: Any) -> None:
        self.executor, self.failing = executor, ""
        self.steps: list[Step] = []
        self.ahead: list[bool] = []

    def launch(self, step: Step, before: Any = None) -> Any:
        """See `Executor`."""
        self.steps.append(step)
        self.ahead.append(before is not None)
        launched = self.executor.launch(step, before)
        self._fail("launch")
        return launched

    def collect(self, launched: Any) -> StepTokens:
        """See `Executor`."""
        self._fail("collect")
        done: StepTokens = self.executor.collect(launched)
        return done

    def _fail(self, where: str) -> None:
        if self.failing == where:
            self.failing = ""
            raise RuntimeError(f"the device failed at {where}")
