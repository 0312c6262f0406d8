"""A model of a model, its cache and its device, so that nothing of what a scheduler decides goes unseen. No torch.

The model is a chain of hashes: what it writes for a token depends on what lies in the cache for the token before, and
it looks at every earlier token of the sequence as attention does. Which token comes next is a hash of the last one
written. So what a sequence says is a pure function of its prompt and seed (`says`), the same in any company; a block
that is read by the wrong sequence, was copied too late or comes back as another one gives itself away at once.

Steps are computed when they are launched, as a device does in its order; tokens are told when they are collected.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phase0_prototype.request import Request
from phase0_prototype.step import NO_TOKEN, Step, StepTokens
from phase1_memory.allocator import make_allocator
from phase1_memory.block_tables import BlockTables
from phase1_memory.runs import Write
from phase4_scheduler.scheduler_config import SchedulerConfig

VOCAB = 50
POISON = 13  # in a prompt: some of the sequence's logits are no numbers


class FailureError(RuntimeError):
    """The device has failed."""


def mixed(*values: int) -> int:
    """A hash of integers, the same in every process."""
    return zlib.crc32(repr(values).encode())


def chosen(mark: int, request: Request) -> int:
    """The token that follows what was written last."""
    if POISON in request.prompt_token_ids and mark % 9 == 0:
        return NO_TOKEN
    return mixed(mark, request.seed) % VOCAB


def says(request: Request) -> tuple[list[int], str]:
    """What a sequence says if nobody interrupts it, and how it ends: computed alone, without scheduler or cache."""
    mark, output = 0, list[int]()
    for token in request.prompt_token_ids:
        mark = mixed(mark, token)
    while len(output) < request.max_tokens:
        token = chosen(mark, request)
        if token == NO_TOKEN:
            return output, "error"
        output.append(token)
        if token in request.eos_token_ids:
            return output, "stop"
        mark = mixed(mark, token)
    return output, "length"


class ModelMemory:
    """A `Memory` whose blocks hold what the model wrote."""

    def __init__(self, num_blocks: int, page: int) -> None:
        self.tables = BlockTables(make_allocator(num_blocks, kind="python"), page)
        self.page = page
        self.cells: list[list[int | None]] = [[None] * page for _ in range(num_blocks)]

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return self.tables.num_free

    def reserve(self, writes: Sequence[Write]) -> bool:
        """See `Memory`."""
        copies = self.tables.reserve(writes)
        for source, destination in copies or ():
            self.cells[destination] = list(self.cells[source])
        return copies is not None

    def fork(self, parent: Request, child: Request) -> None:
        """See `Memory`."""
        child.num_computed_tokens = self.tables.fork(parent.request_id, child.request_id, parent.num_computed_tokens)

    def release(self, request: Request) -> None:
        """See `Memory`."""
        self.tables.release(request.request_id)

    def at(self, name: str, position: int) -> tuple[int, int]:
        """Block and place of a sequence's token."""
        return self.tables.tables[name][position // self.page], position % self.page

    def spoil_free_blocks(self) -> None:
        """Nobody may find there what he forgot to take along."""
        held = {block for table in self.tables.tables.values() for block in table}
        for block in set(range(len(self.cells))) - held:
            self.cells[block] = [None] * self.page


class ModelSwap:
    """A `Swap` that may be full, slow and forgetful: how likely it refuses, is not ready, and has lost something."""

    def __init__(self, memory: ModelMemory, full: float = 0.0, slow: float = 0.0, forgetful: float = 0.0) -> None:
        self.memory, self.full, self.slow, self.forgetful = memory, full, slow, forgetful
        self.dice = random.Random(0)
        self.kept: dict[str, list[list[int | None]]] = {}
        self.saved = Counter[str]()

    def out(self, request: Request) -> bool:
        """See `Swap`."""
        name, memory = request.request_id, self.memory
        assert name not in self.kept, "swapped twice"
        if self.dice.random() < self.full:
            return False
        pages = memory.tables.pages(request.num_computed_tokens)
        self.kept[name] = [list(memory.cells[block]) for block in memory.tables.tables[name][:pages]]
        self.saved[name] += 1
        return True

    def ready(self, request: Request) -> bool:
        """See `Swap`."""
        assert request.request_id in self.kept
        return self.dice.random() >= self.slow

    def back(self, request: Request) -> bool:
        """See `Swap`."""
        name = request.request_id
        content = self.kept.pop(name)
        if self.dice.random() < self.forgetful:
            return False
        for block, cells in zip(self.memory.tables.tables[name], content, strict=False):
            self.memory.cells[block] = list(cells)
        return True

    def drop(self, request: Request) -> None:
        """See `Swap`."""
        del self.kept[request.request_id]


@dataclass
class ModelLaunched:
    """A step whose tokens are there and have not been told."""

    step: Step
    tokens: dict[str, int]


@dataclass
class ModelExecutor:
    """Computes steps, and checks each before it does.

    Attributes:
        failing: "", or where the next step fails: "launch" or "collect".
        steps: all that were launched.
        place: by sequence, the position that has to be computed next.
        preemptions: by sequence, when it was scheduled last.
    """

    memory: ModelMemory
    config: SchedulerConfig
    failing: str = ""
    steps: list[Step] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)
    preemptions: Counter[str] = field(default_factory=Counter)
    on_its_way: list[Step] = field(default_factory=list)

    def launch(self, step: Step, before: ModelLaunched | None = None) -> ModelLaunched:
        """Check and compute a step."""
        self.check(step, before)
        self.steps.append(step)
        self.on_its_way.append(step)
        tokens: dict[str, int] = {}
        for s in step.scheduled:
            mark = self._compute(s, before)
            if s.samples:
                tokens |= {r.request_id: chosen(mark, r) for r in (s.request, *s.forks)}
        self._fail("launch")
        return ModelLaunched(step, tokens)

    def collect(self, launched: ModelLaunched) -> StepTokens:
        """Tell the tokens."""
        self._fail("collect")
        assert self.on_its_way.pop(0) is launched.step, "steps are collected in their order"
        requests = launched.step.sampling
        return StepTokens(
            launched.step, requests, range(len(requests)), [launched.tokens[r.request_id] for r in requests]
        )

    def check(self, step: Step, before: ModelLaunched | None) -> None:
        """What is true of every step."""
        config, requests = self.config, step.requests
        assert step.scheduled and len(set(requests)) == len(requests) <= config.max_num_seqs
        alone = len(step.scheduled) == 1 and not config.enable_chunked_prefill
        assert step.num_tokens <= config.max_num_batched_tokens or alone, "more tokens than the budget"
        holders = Counter(block for table in self.memory.tables.tables.values() for block in table)
        for s in step.scheduled:
            name = s.request.request_id
            assert s.request.finish_reason is None, "computes for somebody who has ended"
            lost = s.request.preemptions > self.preemptions[name]
            assert s.start == self.place.get(name, 0) or (lost and s.start == 0), "a gap, or computed twice"
            self.preemptions[name] = s.request.preemptions
            assert s.pending == (name in before.tokens if before and s.end > s.request.num_tokens else 0)
            assert s.end <= s.request.num_tokens + s.pending
            if config.enable_chunked_prefill and config.long_prefill_token_threshold:
                assert s.num_tokens <= config.long_prefill_token_threshold
            for position in range(s.start, s.end):
                block, _ = self.memory.at(name, position)
                assert holders[block] == 1 + len(s.forks), "writes where others read"
            for fork in s.forks:
                assert fork.prompt_token_ids == s.request.prompt_token_ids and fork.group == s.request.group
                assert not fork.output_token_ids and not s.request.output_token_ids and s.samples
            self.place |= dict.fromkeys((name, *(fork.request_id for fork in s.forks)), s.end)

    def forget(self, kept: set[str]) -> None:
        """Sequences but these have nothing computed."""
        self.place = {name: place for name, place in self.place.items() if name in kept}

    def _compute(self, s: Any, before: ModelLaunched | None) -> int:
        """Write what belongs to a sequence's tokens, each from what is in the cache; returns the last."""
        name, cells = s.request.request_id, self.memory.cells
        tokens = s.request.tokens(0, s.end)
        if s.pending:
            tokens.append(max(0, before.tokens[name]))  # type: ignore[union-attr]  # checked
        mark = 0
        for position, token in enumerate(tokens):
            block, place = self.memory.at(name, position)
            if position >= s.start:
                cells[block][place] = mixed(mark, token)
            assert cells[block][place] == mixed(mark, token), f"wrong keys and values of {name} at {position}"
            mark = mixed(mark, token)
        return mark

    def _fail(self, where: str) -> None:
        if self.failing == where:
            self.failing = ""
            for step in self.on_its_way:  # what they have written is worth nothing
                for s in step.scheduled:
                    for request in (s.request, *s.forks):
                        self.place.pop(request.request_id, None)
                    table = self.memory.tables.tables.get(s.request.request_id)
                    for position in range(s.start, s.end) if table else ():
                        block, place = self.memory.at(s.request.request_id, position)
                        self.memory.cells[block][place] = None
            self.on_its_way.clear()
            raise FailureError(where)
