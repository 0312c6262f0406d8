"""Memory of a server's two processes while thousands of requests come and go: what grows for ever is a leak."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import psutil

from module0_profiling.bench_gpu import CheckFailed
from phase4_scheduler.measures.chaos import storm
from phase4_scheduler.measures.chaos_oracle import Expected
from phase4_scheduler.measures.chaos_plan import Ask
from phase4_scheduler.measures.chaos_server import Victim


@dataclass
class Memory:
    """Bytes of a process when nothing ran: after the warm-up, and after each part of the requests that came then."""

    name: str
    sizes: list[int] = field(default_factory=list)

    @property
    def drift(self) -> float:
        """Share by which the last is more than the first."""
        return self.sizes[-1] / self.sizes[0] - 1


def drift(
    victim: Victim, asks: list[Ask], expected: Expected, *, warm_up: int, parts: int, concurrency: int
) -> tuple[Memory, Memory]:
    """Send all of them; memory of the API's process and of the engine's.

    Args:
        victim: the server; ready.
        asks: the requests.
        expected: their answers.
        warm_up: requests before the first look: caches fill, and the allocator learns what is asked of it. They come
            in storms of the same size as those that follow, for it is the beginning of a storm that asks for most.
        parts: looks after that, and storms.
        concurrency: requests under way together.

    Raises:
        CheckFailed: an answer was wrong.
    """
    engine = victim.engine()
    assert engine is not None
    processes = (psutil.Process(victim.process.pid), engine)
    found = (Memory("API"), Memory("engine"))
    each = -(-(len(asks) - warm_up) // parts)
    edges = [*range(warm_up % each, len(asks), each), len(asks)]
    for begin, end in pairwise([0, *edges] if edges[0] else edges):
        report = storm(victim, asks[begin:end], expected, concurrency=concurrency)
        if report.faults:
            raise CheckFailed(report.faults[0])
        if end < warm_up:
            continue
        for memory, process in zip(found, processes, strict=True):
            memory.sizes.append(process.memory_info().rss)
    return found
