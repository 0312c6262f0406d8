"""An engine without a model (hash_model.py) and everybody who came, with all that is true at any time."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import StepTokens
from phase4_scheduler.scheduler_config import SchedulerConfig
from phase4_scheduler.tests.hash_model import (
    POISON,
    FailureError,
    ModelExecutor,
    ModelMemory,
    ModelSwap,
    mixed,
    says,
)

__all__ = ["END", "POISON", "Clock", "FailureError", "World"]

END = 7  # the token that ends sequences which do not say otherwise


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, now: float = 1.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time."""
        return self.now


class World:
    """Scheduler, loop, cache and model, and everybody who came.

    Args:
        scheduling, loops: the modules of the parts under test.
        num_blocks, page: of the cache.
        ahead: whether the loop is a step ahead.
        faults: of the swap: full, slow, forgetful.
        settings: of `SchedulerConfig`.
    """

    def __init__(
        self,
        scheduling: ModuleType,
        loops: ModuleType,
        *,
        num_blocks: int = 100,
        page: int = 4,
        ahead: bool = False,
        faults: tuple[float, float, float] = (0.0, 0.0, 0.0),
        **settings: Any,
    ) -> None:
        self.config = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 16, "watermark": 0.0, **settings})
        self.clock, self.num_blocks = Clock(), num_blocks
        self.memory = ModelMemory(num_blocks, page)
        self.swap = ModelSwap(self.memory, *faults) if self.config.preemption == "swap" else None
        self.scheduler = scheduling.Scheduler(self.memory, self.config, self.swap, self.clock)
        self.executor = ModelExecutor(self.memory, self.config)
        self.loop = (loops.AheadLoop if ahead else loops.Loop)(self.scheduler, self.executor)
        self.live: list[Request] = []
        self.told: list[Request] = []  # in the order in which their ends were told
        self.shown: dict[str, list[int]] = {}  # tokens that came out
        self.count = 0
        self.sound = True  # nothing has been found so far

    def add(self, prompt: int | list[int], tokens: int, n: int = 1, **more: Any) -> list[Request]:
        """Queue a prompt's sequences; `more` are attributes of `Request`, `params` among them."""
        self.count += 1
        ids = prompt if isinstance(prompt, list) else [mixed(self.count, i) % 7 for i in range(prompt)]
        more = {"params": SamplingParams(n=n, temperature=1.0 if n > 1 else 0), "eos_token_ids": (END,), **more}
        made = []
        for index in range(n):
            name = f"{self.count}.{index}"
            more |= {"seed": mixed(self.count, index), "max_tokens": tokens, "index": index}
            made.append(Request(name, ids, **{"group": str(self.count), "arrival": self.clock.now, **more}))
            self.live.append(made[-1])
            self.shown[name] = []
            self.scheduler.add(made[-1])
        return made

    def one(self, prompt: int | list[int], tokens: int, **more: Any) -> Request:
        """A prompt with one answer that nothing but its length ends."""
        return self.add(prompt, tokens, **{"eos_token_ids": (), **more})[0]

    def step(self) -> StepTokens:
        """Turn the loop once, and take what it says."""
        self.sound = False
        done = self.loop.step()
        for request, row in zip(done.requests, done.rows, strict=True):
            assert request in self.live, "a token of somebody who has ended"
            self.shown[request.request_id].append(done.token_ids[row])
        for request in (*done.requests, *done.step.rejected):
            if request.finish_reason is not None:
                self.end(request)
        assert all(r.finish_reason for r in done.step.rejected)
        self.check()
        return done

    def end(self, request: Request) -> None:
        """Somebody's end was told: for the first time, and with the right words."""
        self.live.remove(request)
        self.told.append(request)
        output, reason = says(request)
        assert request.output_token_ids == self.shown[request.request_id]
        if request.finish_reason == "abort":
            assert request.output_token_ids == output[: len(request.output_token_ids)]
        else:
            assert (request.output_token_ids, request.finish_reason) == (output, reason)

    def abort(self, request: Request) -> None:
        """Somebody goes."""
        self.scheduler.abort(request)
        assert request.finish_reason is not None
        if request in self.live and request.finish_reason == "abort" and request.stop_reason is None:
            self.end(request)
        self.scheduler.abort(request)  # twice does nothing
        self.check()

    def check(self) -> None:
        """What is true at any time, whatever came before."""
        self.sound = False
        scheduler, tables = self.scheduler, self.memory.tables
        unfinished = [r for r in self.live if r.finish_reason is None]
        forks = [fork for forks in getattr(scheduler, "_forks", {}).values() for fork in forks]
        places = Counter(map(id, (*scheduler.waiting, *scheduler.running, *forks)))
        assert places == Counter(map(id, unfinished)), "somebody is in two places, or in none"
        assert len(scheduler.running) + len(forks) <= self.config.max_num_seqs
        running = {r.request_id: r for r in scheduler.running}
        assert tables.tables.keys() == running.keys(), "memory of others than those that run"
        for name, request in running.items():
            assert len(tables.tables[name]) * tables.page >= request.num_computed_tokens
        holders = Counter(block for table in tables.tables.values() for block in table)
        assert [holders[block] for block in range(self.num_blocks)] == tables.references
        assert self.memory.num_free + len(holders) == self.num_blocks, "blocks leaked"
        kept = set(self.swap.kept) if self.swap else set()
        assert len(kept) == scheduler.num_swapped and not kept & running.keys()
        self.executor.forget(running.keys() | kept)
        if hasattr(scheduler, "_number"):
            self.check_books(unfinished)
        self.memory.spoil_free_blocks()
        self.sound = True

    def check_books(self, unfinished: list[Request]) -> None:
        """The solution's own notes: in order, and of nobody who has gone."""
        scheduler = self.scheduler
        names, running = {r.request_id for r in unfinished}, {r.request_id for r in scheduler.running}
        assert scheduler._number.keys() == names
        assert scheduler._room.keys() == running and scheduler._forks.keys() <= running
        for name, room in scheduler._room.items():
            assert room == len(self.memory.tables.tables[name]) * self.memory.page
        assert {entry[-1].request_id for entry in scheduler._deadlines} <= names
        assert scheduler._watchful == sum(r.params.repetition_penalty != 1 for r in unfinished)
        keys = [entry.key for entry in scheduler.queue]
        assert keys == sorted(keys)
        for entry in scheduler.queue:
            assert entry.requests and (not entry.swapped or len(entry.requests) == 1)
            assert len({tuple(r.tokens(0, r.num_tokens)) for r in entry.requests}) == 1, "no common prompt"
        waiting = {r.request_id for entry in scheduler.queue if not entry.swapped for r in entry.requests}
        assert all(r.num_computed_tokens == 0 for r in unfinished if r.request_id in waiting)

    def run(self, most: int | None = None) -> int:
        """To the end, in so many steps at most; returns how many."""
        most = self.bound() if most is None else most
        steps = 0
        while self.live:
            assert steps < most, f"{len(self.live)} have not ended after {most} steps"
            idle = self.loop.idle_for()
            assert idle is not None
            self.clock.now += idle
            self.step()
            steps += 1
        while self.loop.has_unfinished():  # a step ahead of the last
            self.step()
        assert self.loop.idle_for() is None
        self.check()
        assert self.memory.num_free == self.num_blocks and not self.memory.tables.tables
        assert not self.scheduler.running and not self.scheduler.waiting
        assert not getattr(self.scheduler, "_rejected", [])
        return steps

    def bound(self) -> int:
        """Steps that suffice, if at any time the first in the order loses nothing and gets at least a token a step.

        Its work, all computed anew; as long before, until those that run behind it have ended (nobody comes in), as any
        work of another; all of it twice where steps are one ahead and can't be, and a few steps where nothing is done.
        """
        work = [r.num_tokens + r.max_tokens + 2 for r in self.live]
        return 10 + 2 * len(work) * 2 * max(work, default=0)
