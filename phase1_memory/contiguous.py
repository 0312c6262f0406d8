"""Memory in one piece for each request: the baselines that paging is compared with, by first fit."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from phase1_memory.allocator import Run
from phase1_memory.traces import Job


class Holes:
    """Free intervals in ascending order, neighbours merged; first fit."""

    def __init__(self, size: int) -> None:
        self.runs = [Run(0, size)]

    def take(self, length: int) -> Run | None:
        """The beginning of the first hole that is long enough."""
        for place, (start, size) in enumerate(self.runs):
            if size >= length:
                self.runs[place : place + 1] = [Run(start + length, size - length)] if size > length else []
                return Run(start, length)
        return None

    def give(self, run: Run) -> None:
        """Free an interval."""
        place = bisect.bisect(self.runs, run)
        start, end, first, last = run.start, run.start + run.length, place, place
        if place and sum(self.runs[place - 1]) == start:
            first, start = place - 1, self.runs[place - 1].start
        if place < len(self.runs) and self.runs[place].start == end:
            last, end = place + 1, sum(self.runs[place])
        self.runs[first:last] = [Run(start, end - start)]

    @property
    def total(self) -> int:
        """Free altogether."""
        return sum(run.length for run in self.runs)

    @property
    def largest(self) -> int:
        """The longest hole."""
        return max((run.length for run in self.runs), default=0)


class Contiguous:
    """One run a request, reserved when it is admitted, of a length that `reserve` knows; it never grows.

    Methods: see `policies.Policy`.

    Args:
        name: see the module.
        num_blocks, page: of the memory.
        reserve: slots for a job.
    """

    def __init__(self, name: str, num_blocks: int, page: int, reserve: Callable[[Job], int]) -> None:
        self.name, self.num_blocks, self.page, self._reserve = name, num_blocks, page, reserve
        self.copied_tokens = 0
        self.tables: dict[int, range] = {}
        self._holes = Holes(num_blocks)

    @property
    def num_free(self) -> int:
        return self._holes.total

    def need(self, job: Job, tokens: int) -> int:
        return pages(self._reserve(job), self.page)

    def fits(self, job: Job, tokens: int) -> bool:
        return self.need(job, tokens) <= self.num_blocks

    def admit(self, request: int, job: Job, tokens: int) -> bool:
        run = self._holes.take(self.need(job, tokens))
        if run is not None:
            self.tables[request] = range(run.start, run.start + run.length)
        return run is not None

    def grow(self, requests: Sequence[int]) -> list[bool]:
        """See `Policy`: nothing follows a run that is its own."""
        return [False] * len(requests)

    def release(self, requests: Sequence[int]) -> None:
        for request in requests:
            self._holes.give(run_of(self.tables.pop(request)))

    def in_pieces(self, job: Job, tokens: int) -> bool:
        return self._holes.largest < self.need(job, tokens) <= self._holes.total


def pages(tokens: int, page: int) -> int:
    """Blocks of `page` slots that hold so many tokens."""
    return -(-tokens // page)


def run_of(blocks: range) -> Run:
    """The same blocks as a run."""
    return Run(blocks.start, len(blocks))
