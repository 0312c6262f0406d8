"""What the gates of task 4.3 measure: a loop on the executor without a model, whose steps take a set time."""

from __future__ import annotations

import time
from typing import Any

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use, resolve
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import Step, StepTokens
from phase1_memory.allocator import make_allocator
from phase4_scheduler.measures.gates_simulated import ROOM
from phase4_scheduler.memory import CountedMemory
from phase4_scheduler.null_executor import NullExecutor, NullLaunched
from phase4_scheduler.scheduler_config import SchedulerConfig

TEXT = range(7, 107)  # token i of an answer is TEXT[(seed + i) % 100]
STOP = 50  # one of them
STEP_SECONDS, HOST_SECONDS = 0.005, 0.002


class Watched(NullExecutor):
    """Counts what is launched before the step before it was collected, and rows; may raise once.

    Args:
        step_seconds: of a step.
        raises_at: number of the launch that fails; 0: none.
    """

    def __init__(self, step_seconds: float = 0.0, raises_at: int = 0) -> None:
        super().__init__(step_seconds, text=TEXT)
        self.launches = self.collected = self.overlapped = self.rows = 0
        self.raises_at = raises_at

    def launch(self, step: Step, before: NullLaunched | None = None) -> NullLaunched:
        """See `NullExecutor`."""
        self.launches += 1
        if self.launches == self.raises_at:
            raise OSError("the device fell off the bus")
        self.overlapped += self.launches - 1 > self.collected
        self.rows += len(step.sampling)
        return super().launch(step, before)

    def collect(self, launched: NullLaunched) -> StepTokens:
        """See `NullExecutor`."""
        self.collected += 1
        return super().collect(launched)


def overlapped(use: Use) -> Measured:
    """Share of the steps that are launched before the one before them was collected, 100 tokens for 4 requests."""
    executor, loop = _made(use)
    _run(loop, _requests(4, 100))
    return Measured(executor.overlapped / (executor.launches - 1), f"{executor.overlapped} of {executor.launches - 1}")


def rows_in_vain(use: Use) -> Measured:
    """Rows that were computed and whose token nobody got, for each of 8 requests that end with a stop token.

    Of requests that end by length all of them count: there the end is known beforehand.
    """
    executor, loop = _made(use)
    _run(loop, _requests(8, 60))
    by_length = executor.rows - 8 * 60
    executor, loop = _made(use)
    requests = _requests(8, 90, stop_token_ids=[STOP])
    _run(loop, requests)
    kept = sum(len(request.output_token_ids) for request in requests)
    told = f"{executor.rows} rows, {kept} tokens; {by_length} in vain where answers end by length"
    return Measured((executor.rows - kept) / 8 + by_length, told)


def wrong_tokens(use: Use) -> Measured:
    """Tokens that differ from those of the text, whatever ends, joins, is aborted or stops meanwhile."""
    _, loop = _made(use)
    requests = _requests(12, 40, stop_token_ids=[STOP])
    late = [_request(name, 15 + name % 3, SamplingParams(max_tokens=99)) for name in range(12, 20)]
    for request in requests:
        loop.scheduler.add(request)
    told: dict[str, list[int]] = {}
    turns = 0
    while loop.has_unfinished():
        _hear(loop.step(), told)
        turns += 1
        if late and turns % 3 == 0:
            requests.append(late.pop())
            loop.scheduler.add(requests[-1])
        if turns in (5, 9):  # whose token may be under way
            loop.scheduler.abort(requests[turns])
    wrong = 0
    for number, request in enumerate(requests):
        seen = told.get(request.request_id, [])
        expected = _expected(request)[: len(seen)] if number in (5, 9) else _expected(request)
        wrong += seen != expected or request.output_token_ids[: len(seen)] != seen
    return Measured(wrong, f"{sum(map(len, told.values()))} tokens of {len(requests)} requests")


def lost_by_a_failure(use: Use) -> Measured:
    """Requests without their whole answer after a launch that raised in the middle, and blocks not returned."""
    _, loop = _made(use, raises_at=20)
    requests = _requests(6, 40)
    for request in requests:
        loop.scheduler.add(request)
    failures = 0
    while loop.has_unfinished():
        try:
            loop.step()
        except OSError:
            failures += 1
    lost = sum(request.output_token_ids != _expected(request) for request in requests)
    held = loop.scheduler.kv.tables.num_blocks - loop.scheduler.kv.num_free
    return Measured(lost + held, f"{failures} failure, {lost} requests lost, {held} blocks not returned")


def busy(use: Use) -> Measured:
    """Share of the time in which a step of 5 ms is on its way, when the host needs 2 ms between two of them."""
    executor, loop = _made(use, step_seconds=STEP_SECONDS)
    for request in _requests(8, 150):
        loop.scheduler.add(request)
    begin = time.perf_counter()
    while loop.has_unfinished():
        loop.step()
        end = time.perf_counter() + HOST_SECONDS
        while time.perf_counter() < end:
            pass
    seconds = time.perf_counter() - begin
    return Measured(executor.launches * STEP_SECONDS / seconds, f"{executor.launches} steps in {seconds:.2f} s")


def _made(use: Use, step_seconds: float = 0.0, raises_at: int = 0) -> tuple[Watched, Any]:
    config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64)
    memory = CountedMemory(make_allocator(1000, kind="python"))
    scheduler = resolve(ROOM, "scheduler", use).Scheduler(memory, config)
    executor = Watched(step_seconds, raises_at)
    return executor, resolve(ROOM, "loop", use).AheadLoop(scheduler, executor)


def _requests(count: int, tokens: int, **params: Any) -> list[Request]:
    return [_request(name, tokens, SamplingParams(max_tokens=tokens, **params)) for name in range(count)]


def _request(name: int, tokens: int, params: SamplingParams) -> Request:
    return Request(str(name), [1] * (5 + name), params, 11 * name, (), tokens, group=str(name))


def _run(loop: Any, requests: list[Request]) -> None:
    for request in requests:
        loop.scheduler.add(request)
    while loop.has_unfinished():
        loop.step()


def _hear(done: StepTokens, told: dict[str, list[int]]) -> None:
    for request, row in zip(done.requests, done.rows, strict=True):
        told.setdefault(request.request_id, []).append(done.token_ids[row])


def _expected(request: Request) -> list[int]:
    """The answer by the rule: up to its stop token, if it has one, or its length."""
    tokens = [TEXT[(request.seed + i) % len(TEXT)] for i in range(request.max_tokens)]
    stops = [place for place, token in enumerate(tokens) if token in request.params.stop_token_ids]
    return tokens[: stops[0] + 1] if stops else tokens
