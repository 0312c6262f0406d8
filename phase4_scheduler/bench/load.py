"""A load: every request of a workload at its time, each on a connection of its own.

result = await run_load(Target("http://127.0.0.1:8000"), workload, Arrival.closed_loop(8))
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.client import Target, ask, find_model, server_version
from phase4_scheduler.bench.http_client import Address, Pool
from phase4_scheduler.bench.samples import INTERRUPTED, LoadResult, Sample
from phase4_scheduler.bench.workloads import WorkItem, Workload


async def run_load(
    target: Target,
    workload: Workload,
    arrival: Arrival,
    *,
    warmup: Workload | None = None,
    seed: int = 0,
    observe: Callable[[Sample], None] | None = None,
    stop: asyncio.Event | None = None,
) -> LoadResult:
    """Send a workload to a server and note when every token came.

    Args:
        target: the server, and how it is asked.
        workload: the requests.
        arrival: when they are sent.
        warmup: sent before, as many at a time as `arrival` allows (8 if it doesn't say), and in no figure.
        seed: of the arrival times.
        observe: called with each sample when its request has ended.
        stop: when it is set, nothing more is sent, and what is in flight is given up.

    Returns:
        One sample for each request that was sent. Requests that failed are among them.

    Raises:
        UserError: the server can't be reached, lists no model, or can't be asked like this.
    """
    address = Address.of(target.base_url)
    async with Pool(address) as pool:
        if not target.model:
            target = replace(target, model=await find_model(pool, target))
        for item in (*workload.items, *(warmup.items if warmup else ()))[:1]:
            target.body(item)  # a prompt that can't be sent is a user's mistake, not a failed request
        if warmup:
            await _Run(pool, target, Arrival.closed_loop(arrival.max_concurrency or 8), stop, None).run(warmup, seed)
        version = await server_version(pool, target)
        began, cpu = time.time(), time.process_time()
        run = _Run(pool, target, arrival, stop, observe)
        await run.run(workload, seed)
        cpu = time.process_time() - cpu
    ended = max((sample.ended for sample in run.samples if sample.ended is not None), default=0.0)
    return LoadResult(
        config=described(target, workload, arrival, seed, len(warmup.items) if warmup else 0)
        | {"server_version": version},
        samples=tuple(run.samples),
        began=began,
        duration=ended - min((sample.sent for sample in run.samples), default=0.0),
        cpu_seconds=cpu,
        open_loop=arrival.open_loop,
        interrupted=stop is not None and stop.is_set(),
    )


def described(target: Target, workload: Workload, arrival: Arrival, seed: int, warmup: int) -> dict[str, Any]:
    """What was done, as plain data without the key."""
    return {
        "server": str(Address.of(target.base_url)),
        "endpoint": target.endpoint,
        "model": target.model,
        "workload": workload.name,
        "requests": len(workload.items),
        "arrival": str(arrival),
        "seed": seed,
        "warmup": warmup,
        "retries": target.retries,
        "timeout": target.timeout,
        "extra": target.extra,
    }


class _Run:
    """One workload on its way; `samples` grows as requests are sent."""

    def __init__(
        self,
        pool: Pool,
        target: Target,
        arrival: Arrival,
        stop: asyncio.Event | None,
        observe: Callable[[Sample], None] | None,
    ) -> None:
        self.samples: list[Sample] = []
        self._pool, self._target, self._arrival, self._observe = pool, target, arrival, observe
        self._stop = stop or asyncio.Event()
        self._free = asyncio.Semaphore(arrival.max_concurrency) if arrival.max_concurrency else None
        self._start = 0.0

    async def run(self, workload: Workload, seed: int) -> None:
        self._start = time.perf_counter()
        all_sent = asyncio.create_task(self._send(workload, seed))
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((all_sent, stopped), return_when=asyncio.FIRST_COMPLETED)
            if all_sent.done():
                all_sent.result()  # an error of our own is not to be lost
        finally:
            all_sent.cancel()
            stopped.cancel()
            await asyncio.gather(all_sent, stopped, return_exceptions=True)
        for sample in self.samples:
            if sample.ended is None:  # its task was cancelled before it ran
                sample.ended, sample.error = self._clock(), INTERRUPTED

    def _clock(self) -> float:
        return time.perf_counter() - self._start

    async def _send(self, workload: Workload, seed: int) -> None:
        """Send everything and wait for all of it; cancelled, it takes what is in flight along."""
        times = self._arrival.times(len(workload.items), seed)
        async with asyncio.TaskGroup() as group:
            for item, at in zip(workload.items, times, strict=True):
                if (early := at - self._clock()) > 0:
                    await asyncio.sleep(early)
                if self._free:
                    await self._free.acquire()
                sample = Sample(item.output_tokens, at, self._clock())
                self.samples.append(sample)
                group.create_task(self._one(item, sample))

    async def _one(self, item: WorkItem, sample: Sample) -> None:
        try:
            await ask(self._pool, self._target, item, sample, self._clock)
        finally:
            if self._free:
                self._free.release()
            if self._observe:
                self._observe(sample)
