"""What the gates of task 4.4 count: a crowd at the door, in simulation.

The engine behind it is the solution's scheduler, with eight places, on a clock that only steps move. Requests of 100
tokens come at random (Poisson), three times as many as it can serve, and get answers of 50.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from functools import lru_cache
from types import ModuleType
from typing import Any

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use, resolve
from phase4_scheduler.measures.gates_simulated import ROOM, Arrival, Simulated

PLACES, PROMPT, ANSWER = 8, 100, 50  # sequences, tokens
STEP_SECONDS, TOKEN_SECONDS = 0.02, 0.0002
QUEUE = 24  # sequences that may wait, or their prompts
PATIENCE = 8.0  # seconds until clients give up
RUSH, SECONDS = 18.0, 40.0  # requests a second, of which it can serve six, and for how long they come
WINDOW = 10.0  # seconds over which the speed is measured


class Door:
    """A server in front of the simulated engine: it asks for admission, and keeps the books for that.

    Args:
        module: has `Admission` and `Load`.
        bounds: of the queue, as `Admission` takes them.

    Attributes:
        engine: runs who was let in.
        refusals: when, the seconds that were said, and who was inside.
        queued: most sequences inside, beyond those that have places.
        waiting_tokens: most tokens of prompts without a first token.
    """

    def __init__(self, module: ModuleType, **bounds: int) -> None:
        self.module, self.admission = module, module.Admission(**bounds)
        settings = {"max_num_seqs": PLACES, "max_num_batched_tokens": 512}
        solution = Use.parse(f"{ROOM}=solution")
        self.engine = Simulated(solution, settings, step_seconds=STEP_SECONDS, token_seconds=TOKEN_SECONDS)
        self.refusals: list[tuple[float, float, list[str]]] = []
        self.queued = self.waiting_tokens = 0
        self._told, self._computed = 0, 0  # steps whose tokens were counted, and these
        self._speeds: deque[tuple[float, int]] = deque([(0.0, 0)])

    def rush(self) -> Door:
        """Everybody comes, and all who were let in are served."""
        dice, at = random.Random(0), 0.0
        while at < SECONDS:
            at += dice.expovariate(RUSH)
            self.serve_until(at)
            self.ask()
        self.engine.run(())
        return self

    def ask(self) -> bool:
        """One request comes; whether it was let in."""
        load = self.load()
        refusal = self.admission.refusal(load, 1, PROMPT)
        if refusal is not None:
            inside = [r.request_id for r in self.engine.requests if r.finish_reason is None]
            self.refusals.append((self.engine.now, refusal.retry_after, inside))
            return False
        self.engine.add(Arrival(self.engine.now, PROMPT, ANSWER))
        self.queued = max(self.queued, load.open_seqs + 1 - PLACES)
        self.waiting_tokens = max(self.waiting_tokens, load.prompt_tokens + PROMPT)
        return True

    def serve_until(self, moment: float) -> None:
        """Let time go by."""
        self.engine.run((), until=lambda: self.engine.now >= moment)
        self.engine.now = max(self.engine.now, moment)

    def refusals_after(self, moment: float) -> list[tuple[float, float]]:
        """Of each refusal, the seconds that were said, and those in which all who were inside were served."""
        last = self.engine.last
        return [(said, max(last[name] for name in inside) - at) for at, said, inside in self.refusals if at > moment]

    def load(self) -> Any:
        """What admission is told."""
        inside = [r for r in self.engine.requests if r.finish_reason is None]
        prompts = PROMPT * sum(not r.output_token_ids for r in inside)
        left = sum(ANSWER - len(r.output_token_ids) for r in inside)
        waiting = len(self.engine.scheduler.waiting)
        return self.module.Load(len(inside), waiting, PLACES, prompts, prompts + left, self._speed())

    def _speed(self) -> float:
        """Tokens a second over the last seconds."""
        engine, speeds = self.engine, self._speeds
        self._computed += sum(step.num_tokens for step in engine.steps[self._told :])
        self._told = len(engine.steps)
        if engine.now > speeds[-1][0]:
            speeds.append((engine.now, self._computed))
        while len(speeds) > 2 and speeds[1][0] < engine.now - WINDOW:
            speeds.popleft()
        (start, before), (end, after) = speeds[0], speeds[-1]
        return (after - before) / (end - start) if end > start else 0.0


def beyond_the_bounds(use: Use) -> Measured:
    """Most that waited over what may, where sequences are bounded and where tokens of prompts are; the worse."""
    module = resolve(ROOM, "server.admission", use)
    seqs, tokens = Door(module, max_num_queued_reqs=QUEUE).rush(), _bounded_tokens(module)
    worse = max(seqs.queued / QUEUE, tokens.waiting_tokens / (QUEUE * PROMPT))
    return Measured(worse, f"{seqs.queued} sequences of {QUEUE}, {tokens.waiting_tokens} tokens of {QUEUE * PROMPT}")


def given_up(use: Use) -> Measured:
    """Per cent of those let in who waited for longer than clients do."""
    door = _bounded_tokens(resolve(ROOM, "server.admission", use))
    waits = door.engine.waits()
    late = sum(wait > PATIENCE for wait in waits)
    return Measured(
        100 * late / len(waits), f"{len(waits)} let in, {len(door.refusals)} not, longest {max(waits):.1f} s"
    )


def places_used(use: Use) -> Measured:
    """Per cent of the places that are taken while the crowd is at the door: who refuses too many has empty ones."""
    engine = _bounded_tokens(resolve(ROOM, "server.admission", use)).engine
    busy = [step for begin, step in zip(engine.begun, engine.steps, strict=True) if 5 < begin < SECONDS]
    used = sum(len(step.requests) for step in busy)
    return Measured(100 * used / (PLACES * len(busy)), f"{len(engine.requests)} requests were served")


def wrong_advice(use: Use) -> Measured:
    """Per cent by which Retry-After misses the time in which all who are inside are served; the worst of three queues.

    Somebody is always refused in a rush, so there it is the median of all refusals.
    """
    module = resolve(ROOM, "server.admission", use)
    told = [_advice(module, crowd) for crowd in (40, 100, 300)]
    wrong = [abs(said / true - 1) for said, true in told]
    if refusals := _bounded_tokens(module).refusals_after(WINDOW):
        wrong.append(statistics.median(abs(said / true - 1) for said, true in refusals))
    return Measured(100 * max(wrong), "; ".join(f"told {said:.1f} s of {true:.1f} s" for said, true in told))


def refused_again(use: Use) -> Measured:
    """Requests that come back when they were told to, alone, and are refused once more."""
    module = resolve(ROOM, "server.admission", use)
    doors = [
        Door(module, max_num_queued_reqs=QUEUE),
        Door(module, max_num_queued_tokens=QUEUE * PROMPT),
        Door(module, max_num_queued_reqs=0),
    ]
    again = sum(_comes_again(door) for door in doors)
    return Measured(again, f"{sum(bool(door.refusals) for door in doors)} came back")


def _comes_again(door: Door) -> bool:
    """Whether somebody who was refused is refused again, having waited for as long as was said."""
    for _ in range(PLACES):
        door.ask()
    door.serve_until(2.0)  # until there is a speed
    for _ in range(100):
        door.ask()
    if not door.refusals:
        return False
    at, said, _ = door.refusals[-1]
    door.serve_until(at + said)
    return not door.ask()


def _advice(module: ModuleType, crowd: int) -> tuple[float, float]:
    """Seconds that are said when half of a crowd has been served, and those that the others take."""
    door = Door(module)
    for _ in range(crowd):
        door.ask()
    door.engine.run((), until=lambda: len(door.engine.last) >= crowd // 2)
    now, said = door.engine.now, module.retry_after(door.load())
    door.engine.run(())
    return said, door.engine.now - now


@lru_cache
def _bounded_tokens(module: ModuleType) -> Door:
    """Kept: several gates ask about the same rush, and an edited part is another module."""
    return Door(module, max_num_queued_tokens=QUEUE * PROMPT).rush()
