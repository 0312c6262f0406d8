"""Ten thousand random events on a small cache with a real offload store, and every invariant after each of them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from phase0_prototype.kv_spec import KVSpec
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase1_memory.runs import Write
from phase1_memory.tests.conftest import is_empty

STEPS = 10_000
BLOCKS, PAGE = 40, 4
LONGEST = 50  # tokens of a sequence
SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=2, dtype=torch.float64)


@dataclass
class Sequence:
    """A request and what it has written: [tokens] marks, of which every side of every layer has its own multiple."""

    request: Request
    marks: list[float] = field(default_factory=list)


class Stress:
    """The cache, its store, and for each sequence, in memory or out of it, what it must read."""

    def __init__(self, kv, store, seed):
        self.kv, self.store, self.dice = kv, store, random.Random(seed)
        self.here: dict[str, Sequence] = {}
        self.away: dict[str, Sequence] = {}
        self.names, self.marks = itertools.count(), itertools.count(1)
        self.happened: Counter[str] = Counter()
        # [tokens of the cache, D], in the memory of the cache itself
        self.sides = [side.view(-1, SPEC.head_dim).numpy() for layer in range(2) for side in kv.layer(layer)]

    def request(self) -> Request:
        return Request(f"r{next(self.names)}", [0], SamplingParams(), 0, (), 1)

    def some(self, most):
        return self.dice.sample(sorted(self.here), self.dice.randint(0, min(most, len(self.here))))

    def event(self) -> None:
        events = (self.append, self.append, self.append, self.begin, self.fork, self.end, self.swap_out, self.swap_in)
        self.dice.choice(events)()

    def write(self, sequences: dict[str, tuple[Sequence, int]]) -> bool:
        """{name: (sequence, new tokens)}; whether there was room."""
        writes = [Write(name, len(s.marks), len(s.marks) + count) for name, (s, count) in sequences.items()]
        if not self.kv.reserve(writes):
            self.happened["refused"] += 1
            return False
        for sequence, count in sequences.values():
            start = len(sequence.marks)
            sequence.marks += [float(next(self.marks)) for _ in range(count)]
            slots = self.slots(sequence)[start:]
            for i, side in enumerate(self.sides, start=1):
                side[slots] = np.outer(sequence.marks[start:], [i, -i])
            sequence.request.num_computed_tokens = len(sequence.marks)
        return True

    def begin(self) -> None:
        sequence = Sequence(self.request())
        name = sequence.request.request_id
        if self.write({name: (sequence, self.dice.randint(1, 20))}):
            self.here[name] = sequence
            self.happened["begun"] += 1

    def append(self) -> None:
        growing = [name for name in self.some(8) if len(self.here[name].marks) < LONGEST]
        count = self.dice.choice([1, 1, 1, 5])
        self.happened["appended"] += bool(growing) and self.write({name: (self.here[name], count) for name in growing})

    def fork(self) -> None:
        for name in self.some(1):
            parent, child = self.here[name], self.request()
            self.kv.fork(parent.request, child)
            if child.num_computed_tokens:
                self.happened["shared"] += 1
            self.here[child.request_id] = Sequence(child, parent.marks[: child.num_computed_tokens])
            if not child.num_computed_tokens:  # begins with nothing: it holds no memory, and is forgotten
                self.kv.release(child)
                del self.here[child.request_id]

    def end(self) -> None:
        for name in self.some(2):
            self.kv.release(self.here.pop(name).request)
            self.happened["ended"] += 1

    def spoil_free_blocks(self) -> None:
        """A sequence that comes back into its old blocks must not find there what it forgot to take along."""
        held = {block for table in self.kv.tables.tables.values() for block in table}
        for side in self.sides:
            side.reshape(-1, PAGE, SPEC.head_dim)[[block for block in range(BLOCKS) if block not in held]] = -1

    def swap_out(self) -> None:
        for name in self.some(2):
            request = self.here[name].request
            if self.store.save(name, self.kv.read(self.kv.blocks(request))):
                self.kv.release(request)
                self.away[name] = self.here.pop(name)
                self.happened["swapped out"] += 1
            else:
                self.happened["store full"] += 1
        self.spoil_free_blocks()

    def swap_in(self) -> None:
        if not self.away:
            return
        name = self.dice.choice(sorted(self.away))
        sequence = self.away[name]
        if self.dice.random() < 0.2:
            del self.away[name]
            self.store.drop(name)
            return
        self.store.prefetch(name)
        if not self.kv.reserve([Write(name, 0, len(sequence.marks))]):
            self.happened["refused"] += 1
            return
        data = self.store.load(name)
        assert data is not None
        self.kv.write(self.kv.blocks(sequence.request), data)
        self.here[name] = self.away.pop(name)
        self.happened["swapped in"] += 1

    def slots(self, sequence) -> np.ndarray:
        """[tokens], where the sequence's tokens are in the cache."""
        token = np.arange(len(sequence.marks))
        return np.asarray(self.kv.blocks(sequence.request))[token // PAGE] * PAGE + token % PAGE

    def check(self) -> None:
        tables = self.kv.tables
        holders = Counter(block for table in tables.tables.values() for block in table)
        assert set(tables.tables) == set(self.here)
        assert list(tables.references) == [holders[block] for block in range(BLOCKS)]
        assert self.kv.num_free + len(holders) == BLOCKS, "blocks leaked"
        assert tables.shared_blocks() == sum(count > 1 for count in holders.values())
        for name, sequence in self.here.items():
            assert len(tables.tables[name]) == -(-len(sequence.marks) // PAGE)
        if self.here:  # all sequences at once: one comparison a side
            slots = np.concatenate([self.slots(sequence) for sequence in self.here.values()])
            marks = np.concatenate([sequence.marks for sequence in self.here.values()])
            for i, side in enumerate(self.sides, start=1):
                assert (side[slots] == np.outer(marks, [i, -i])).all(), "a sequence does not read what it wrote"


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_growing_forking_ending_and_swapping_keeps_every_token(part, make_cache, tmp_path, seed):
    kv = make_cache(BLOCKS, PAGE, SPEC)
    size = kv.block_bytes
    with part("offload").open_store(size, torch.device("cpu"), 20 * size, tmp_path, 60 * size) as store:
        stress = Stress(kv, store, seed)
        for _ in range(STEPS):
            stress.event()
            stress.check()
        usual = ("begun", "appended", "ended", "refused", "swapped out", "swapped in")
        assert all(stress.happened[what] > 50 for what in usual), stress.happened
        for name in list(stress.away):
            store.drop(name)
        for sequence in list(stress.here.values()):
            kv.release(sequence.request)
        assert kv.num_free == BLOCKS and is_empty(store)


@pytest.mark.usefixtures("sharing")
def test_the_stress_covers_copies_on_write_and_a_full_store(make_cache, part):
    """What the test above is for, where blocks are shared."""
    kv = make_cache(BLOCKS, PAGE, SPEC)
    with part("offload").open_store(kv.block_bytes, torch.device("cpu"), 20 * kv.block_bytes, None, 0) as store:
        stress = Stress(kv, store, seed=2)
        for _ in range(STEPS // 2):
            stress.event()
        stress.check()
        assert stress.happened["shared"] > 100 and stress.happened["store full"] > 50 and kv.copied_blocks > 50
