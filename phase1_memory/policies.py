"""Six ways to give memory to requests that grow, behind one interface, for the simulator.

    max      one run of max_model_len slots a request: phase 0, FasterTransformer, "Orca (Max)"
    pow2     one run: the prompt, and the output rounded up to a power of two: "Orca (Pow2)"
    oracle   one run of exactly what the request will need: "Orca (Oracle)", the best that contiguous memory can do
    runs     one run of a power of two of pages, doubled whenever it is full: our buddy allocator, requests in one piece
    pages    pages anywhere, neighbours preferred: our buddy allocator as the engine uses it
    vllm     pages anywhere from a queue: what vLLM's block manager does

The first three are the baselines of the PagedAttention paper (Kwon et al., 2023, arXiv 2309.06180, section 6.1). There
Orca has a buddy allocator; here the baselines get first fit at the grain of a token, which wastes less.

A slot is the memory of one token. A policy says which slots a request holds, and never how many of them are filled: the
simulator counts that, in one way for all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from phase1_memory.allocator import Allocator, BuddyAllocator, Run, Want
from phase1_memory.block_tables import runs_of
from phase1_memory.contiguous import Contiguous, pages, run_of
from phase1_memory.traces import Job

HEADROOM = 64  # pages that a new request of "pages" would like to have free behind it: 1024 tokens
WATERMARK = 0.01  # share of the blocks that admission leaves free, in vLLM and in our scheduler


class Policy(Protocol):
    """What the simulator needs. Requests are numbered in the order of their arrival.

    Attributes:
        name: as in the list above.
        page: slots in a block; memory is given out in blocks.
        num_blocks: blocks there are.
        copied_tokens: tokens that were moved to make room for their own request.
    """

    name: str
    page: int
    num_blocks: int
    copied_tokens: int

    @property
    def tables(self) -> Mapping[int, Sequence[int]]:
        """The blocks of every request that holds memory, in the order of its tokens; a run is a `range`."""
        ...

    @property
    def num_free(self) -> int:
        """Free blocks."""
        ...

    def need(self, job: Job, tokens: int) -> int:
        """Blocks that admission gives to a job with `tokens` tokens to store, the one of its first step included."""
        ...

    def fits(self, job: Job, tokens: int) -> bool:
        """Whether the job could be admitted if the memory were empty."""
        ...

    def admit(self, request: int, job: Job, tokens: int) -> bool:
        """Give a request its first memory; False, and nothing changes, where there is not enough."""
        ...

    def grow(self, requests: Sequence[int]) -> list[bool]:
        """Give requests whose slots are full at least one slot more, in this order; False for those that get none."""
        ...

    def release(self, requests: Sequence[int]) -> None:
        """The requests hold nothing any more: they ended or were preempted."""
        ...

    def in_pieces(self, job: Job, tokens: int) -> bool:
        """Whether there is enough free memory for the job, but not in one run as the policy needs it."""
        ...


class BuddyRuns:
    """One run of 2^k pages a request; a full one is doubled, in place where its neighbours are free, else elsewhere.

    Args:
        allocator: of pages, with headroom 1: any run that is long enough will do.
        page: slots in a page.
    """

    name = "runs"

    def __init__(self, allocator: Allocator, page: int) -> None:
        self._allocator, self.page, self.num_blocks = allocator, page, allocator.num_blocks
        self.copied_tokens = 0
        self.tables: dict[int, range] = {}

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    def need(self, job: Job, tokens: int) -> int:
        return power_of_two(pages(tokens, self.page))

    def fits(self, job: Job, tokens: int) -> bool:
        """See `Policy`: a run is aligned, so the largest is the largest power of two in the memory."""
        return 2 * self.need(job, tokens) <= power_of_two(self.num_blocks + 1)

    def admit(self, request: int, job: Job, tokens: int) -> bool:
        run = self._take(self.need(job, tokens))
        if run:
            self.tables[request] = run
        return bool(run)

    def grow(self, requests: Sequence[int]) -> list[bool]:
        return [self._extend(request) or self._move(request) for request in requests]

    def release(self, requests: Sequence[int]) -> None:
        self._allocator.step([run_of(self.tables.pop(request)) for request in requests], [])

    def in_pieces(self, job: Job, tokens: int) -> bool:
        return self._allocator.largest_free_run() < self.need(job, tokens) <= self.num_free

    def _take(self, length: int) -> range:
        if self._allocator.largest_free_run() < length:
            return range(0)
        (runs,) = self._allocator.step([], [Want(length)])
        assert runs is not None and len(runs) == 1, "a free run of a power of two was given in pieces"
        return range(runs[0].start, runs[0].start + length)

    def _extend(self, request: int) -> bool:
        table = self.tables[request]
        (runs,) = self._allocator.step([], [Want(len(table), table[-1])])
        if runs == [Run(table[-1] + 1, len(table))]:
            self.tables[request] = range(table.start, table.stop + len(table))
            return True
        self._allocator.step(runs or [], [])
        return False

    def _move(self, request: int) -> bool:
        table = self.tables[request]
        run = self._take(2 * len(table))
        if run:
            self.copied_tokens += len(table) * self.page
            self._allocator.step([run_of(table)], [])
            self.tables[request] = run
        return bool(run)


class Paged:
    """What both paged policies share: admission by a number of pages, growth by one.

    Args:
        name: see the module.
        num_blocks, page: of the memory.
        watermark: share of the blocks that admission leaves free.
    """

    def __init__(self, name: str, num_blocks: int, page: int, watermark: float) -> None:
        self.name, self.num_blocks, self.page = name, num_blocks, page
        self.spare = math.ceil(watermark * num_blocks)
        self.copied_tokens = 0
        self.tables: dict[int, list[int]] = {}

    def need(self, job: Job, tokens: int) -> int:
        return pages(tokens, self.page)

    def in_pieces(self, job: Job, tokens: int) -> bool:
        """See `Policy`: any page is as good as any other."""
        return False


class Pages(Paged):
    """Pages from the engine's allocator, one call of it a step; the watermark is waived while nothing runs.

    Args:
        allocator: of pages.
        page: slots in a page.
        watermark: see `Paged`.
    """

    def __init__(self, allocator: Allocator, page: int, watermark: float = WATERMARK) -> None:
        super().__init__("pages", allocator.num_blocks, page, watermark)
        self._allocator = allocator
        self._freed: list[int] = []  # given back with the next call

    @property
    def num_free(self) -> int:
        return self._allocator.num_free + len(self._freed)

    def fits(self, job: Job, tokens: int) -> bool:
        return self.need(job, tokens) <= self.num_blocks

    def admit(self, request: int, job: Job, tokens: int) -> bool:
        need = self.need(job, tokens)
        if need + (self.spare if self.tables else 0) > self.num_free:
            return False
        (runs,) = self._step([Want(need)])
        self.tables[request] = _blocks(runs or [])
        return True

    def grow(self, requests: Sequence[int]) -> list[bool]:
        answers = self._step([Want(1, self.tables[request][-1]) for request in requests])
        for request, runs in zip(requests, answers, strict=True):
            self.tables[request] += _blocks(runs or [])
        return [runs is not None for runs in answers]

    def release(self, requests: Sequence[int]) -> None:
        for request in requests:
            self._freed += self.tables.pop(request)

    def _step(self, wanted: list[Want]) -> list[list[Run] | None]:
        freed, self._freed = runs_of(self._freed), []
        return self._allocator.step(freed, wanted)


class VllmBlockManager(Paged):
    """The block manager of vLLM in our words: a queue of free blocks, and a watermark that admission never goes below.

    The block that was freed first is given out first, and the last block of a request is freed before its first: so the
    prefix cache of vLLM 1 keeps what is likely to be asked for again (`FreeKVCacheBlockQueue` in
    vllm/v1/core/kv_cache_utils.py). Watermark: `BlockSpaceManager.can_allocate` of vLLM 0, 1 %.
    """

    def __init__(self, num_blocks: int, page: int, watermark: float = WATERMARK) -> None:
        super().__init__("vllm", num_blocks, page, watermark)
        self._queue = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._queue)

    def fits(self, job: Job, tokens: int) -> bool:
        """See `Policy`: vLLM refuses for good what never leaves the watermark free."""
        return self.need(job, tokens) + self.spare <= self.num_blocks

    def admit(self, request: int, job: Job, tokens: int) -> bool:
        need = self.need(job, tokens)
        if need + self.spare > len(self._queue):
            return False
        self.tables[request] = [self._queue.popleft() for _ in range(need)]
        return True

    def grow(self, requests: Sequence[int]) -> list[bool]:
        served = min(len(requests), len(self._queue))
        for request in requests[:served]:
            self.tables[request].append(self._queue.popleft())
        return [place < served for place in range(len(requests))]

    def release(self, requests: Sequence[int]) -> None:
        for request in requests:
            self._queue.extend(reversed(self.tables.pop(request)))


@dataclass(frozen=True)
class Memory:
    """What a policy gets.

    Attributes:
        tokens: slots, rounded down to whole blocks.
        page: slots in a page.
        grain: slots in a block of the contiguous policies "max", "pow2" and "oracle".
        max_model_len: most tokens of a request.
    """

    tokens: int
    page: int = 16
    grain: int = 1
    max_model_len: int = 2048


def make_policy(name: str, memory: Memory) -> Policy:
    """An empty memory under the policy of that name.

    Raises:
        KeyError: no such policy; NAMES has them.
    """
    num_pages, limit = memory.tokens // memory.page, memory.max_model_len
    if name in RESERVATIONS:
        reserve = RESERVATIONS[name]
        blocks = memory.tokens // memory.grain
        return Contiguous(name, blocks, memory.grain, lambda job: min(limit, reserve(job, limit)))
    made: dict[str, Callable[[], Policy]] = {
        "runs": lambda: BuddyRuns(BuddyAllocator(num_pages), memory.page),
        "pages": lambda: Pages(BuddyAllocator(num_pages, HEADROOM), memory.page),
        "vllm": lambda: VllmBlockManager(num_pages, memory.page),
    }
    return made[name]()


RESERVATIONS: dict[str, Callable[[Job, int], int]] = {
    "max": lambda job, limit: limit,
    "pow2": lambda job, limit: job.prompt + power_of_two(job.output),
    "oracle": lambda job, limit: job.total,
}
NAMES = (*RESERVATIONS, "runs", "pages", "vllm")


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def _blocks(runs: Sequence[Run]) -> list[int]:
    return [block for run in runs for block in range(run.start, run.start + run.length)]
