"""The offload store: what was saved comes back bit for bit or not at all, whatever the disk does, and nobody waits.

`IMPL=framework|solution|mine` says whose store runs. The tiers are shared; their disk is a real file, and a test that
wants it to fail puts itself between the tier and the operating system (`Disk`).
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.errors import UserError
from phase1_memory.offload_file import BOUNCE_BYTES, FileCalls, FileTier, open_tiers
from phase1_memory.offload_tiers import Arena, LostBlockError, RamTier, Tier, stretches

BLOCK = 4096  # bytes: the smallest that can go past the page cache
CPU = torch.device("cpu")
proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the nameless file is opened through /proc")


def implementation() -> ModuleType:
    return parts.resolve("phase1_memory", "offload", Use.from_env("phase1", default="solution"))


@dataclass
class Disk:
    """The real calls, each after what the test wants to happen.

    Attributes:
        fail: error number of every call of that kind, "write" or "read".
        short: calls say that they have moved at most so many bytes, and move no sector more.
        hold: calls wait for this event, but never longer than two seconds.
        begun, done: calls of each kind that were made, and that have ended well.
    """

    fail: dict[str, int] = field(default_factory=dict)
    short: int | None = None
    hold: dict[str, threading.Event] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=lambda: {"write": 0, "read": 0})
    done: dict[str, int] = field(default_factory=lambda: {"write": 0, "read": 0})
    descriptors: set[int] = field(default_factory=set)

    @property
    def calls(self) -> FileCalls:
        return FileCalls(
            write=lambda *arguments: self.move("write", os.pwritev, *arguments),
            read=lambda *arguments: self.move("read", os.preadv, *arguments),
        )

    def move(self, kind: str, call: Any, descriptor: int, memory: list[memoryview], offset: int) -> int:
        self.descriptors.add(descriptor)
        self.begun[kind] += 1
        if kind in self.hold:
            self.hold[kind].wait(2)
        if kind in self.fail:
            raise OSError(self.fail[kind], os.strerror(self.fail[kind]))
        most = len(memory[0]) if self.short is None else self.short
        moved: int = call(descriptor, [memory[0][: -(-most // BLOCK) * BLOCK]], offset)
        self.done[kind] += 1
        return min(moved, most)

    def open(self) -> int:
        """The file once more, for writing through the page cache."""
        (descriptor,) = self.descriptors
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)

    def damage(self, slot: int, write: Callable[[bytes], bytes]) -> None:
        """Replace the bytes of a slot."""
        descriptor = self.open()
        try:
            os.pwrite(descriptor, write(os.pread(descriptor, BLOCK, slot * BLOCK)), slot * BLOCK)
        finally:
            os.close(descriptor)


def flipped(block: bytes) -> bytes:
    return block[:100] + bytes([block[100] ^ 1]) + block[101:]


def random_blocks(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, BLOCK), dtype=torch.uint8, generator=generator)


def settle(store: Any) -> None:
    """Wait until every write has ended."""
    until = time.monotonic() + 10
    while store.pending_bytes:
        assert time.monotonic() < until, "writes do not end"
        time.sleep(0.001)


def wait_until(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Stores that are closed when the test ends; tiers by their capacity in blocks."""
    stores = []

    def build(
        ram: int = 0, file: int = 0, disk: Disk | None = None, direct: bool = True, **settings: Any
    ) -> SimpleNamespace:
        tiers: list[Tier] = [RamTier(ram, BLOCK, pin=False)] if ram else []
        if file:
            tiers.append(FileTier(tmp_path, file, BLOCK, direct=direct, calls=disk.calls if disk else None))
        stores.append(implementation().OffloadStore(tiers, BLOCK, CPU, **settings))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


# What comes back


class AnyOrder(RuleBasedStateMachine):
    """Requests come and go while the disk has its moods. The model is a dict of the bytes that were saved."""

    keys = st.sampled_from("abcdefgh")

    @initialize(ram=st.integers(0, 6), file=st.integers(1, 12), direct=st.booleans())
    def make(self, ram: int, file: int, direct: bool) -> None:
        self.disk, self.directory = Disk(), tempfile.TemporaryDirectory()
        tiers: list[Tier] = [RamTier(ram, BLOCK, pin=False)] if ram else []
        tiers.append(FileTier(Path(self.directory.name), file, BLOCK, direct=direct, calls=self.disk.calls))
        self.capacity = ram + file
        self.store = implementation().OffloadStore(tiers, BLOCK, CPU, max_pending_bytes=4 * BLOCK)
        self.saved: dict[str, Tensor] = {}
        self.in_danger: set[str] = set()  # alive while something was wrong with the disk
        self.seed = 0
        self.warnings: list[logging.LogRecord] = []
        self.handler = logging.Handler()
        self.handler.emit = self.warnings.append  # type: ignore[method-assign]
        logging.getLogger(implementation().__name__).addHandler(self.handler)
        logging.getLogger(implementation().__name__).propagate = False

    @rule(key=keys, count=st.integers(0, 5))
    def save(self, key: str, count: int) -> None:
        if key in self.saved:
            return
        self.seed += 1
        blocks = random_blocks(count, self.seed)
        # what is being written may be given back meanwhile, but nothing else is taken
        room = any(tier.used_blocks + count <= tier.capacity_blocks for tier in self.store.tiers)
        if self.store.save(key, blocks.clone()):
            self.saved[key] = blocks
            if self.disk.fail:
                self.in_danger.add(key)
        else:
            assert count and not room

    @rule(key=keys)
    def prefetch(self, key: str) -> None:
        if key in self.saved:
            self.store.prefetch(key)

    @rule(key=keys)
    def load(self, key: str) -> None:
        if key not in self.saved:
            return
        before = len(self.warnings)
        blocks = self.store.load(key)
        wanted = self.saved.pop(key)
        if blocks is None:
            assert key in self.in_danger
            assert len(self.warnings) == before + 1 and key in self.warnings[-1].getMessage()
        else:
            assert torch.equal(blocks, wanted)
        self.in_danger.discard(key)

    @rule(key=keys)
    def load_when_ready(self, key: str) -> None:
        if key in self.saved:
            self.store.prefetch(key)
            assert wait_until(lambda: self.store.ready(key))
            self.load(key)

    @rule(key=keys)
    def drop(self, key: str) -> None:
        self.store.drop(key)
        self.saved.pop(key, None)
        self.in_danger.discard(key)

    @rule(kind=st.sampled_from(["write", "read"]), error=st.sampled_from([errno.ENOSPC, errno.EIO]))
    def disk_fails(self, kind: str, error: int) -> None:
        self.disk.fail[kind] = error
        self.in_danger |= set(self.saved)

    @rule()
    def disk_moves_little(self) -> None:
        self.disk.short = BLOCK

    @rule()
    def disk_is_well_again(self) -> None:
        settle(self.store)  # what failed in the meantime belongs to those that were in danger
        self.disk.fail.clear()
        self.disk.short = None

    @rule(slot=st.integers(0, 11))
    def a_bit_flips(self, slot: int) -> None:
        settle(self.store)
        if slot < self.store.tiers[-1].capacity_blocks and self.disk.descriptors and Path("/proc/self/fd").is_dir():
            self.disk.damage(slot, flipped)
            self.in_danger |= set(self.saved)

    @invariant()
    def no_more_is_held_than_there_is(self) -> None:
        if hasattr(self, "store"):
            assert 0 <= self.store.used_blocks <= self.capacity

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for key in list(self.saved):
            self.store.drop(key)
        assert wait_until(lambda: self.store.used_blocks == 0), "slots of dropped requests were not given back"
        self.store.close()
        logging.getLogger(implementation().__name__).removeHandler(self.handler)
        logging.getLogger(implementation().__name__).propagate = True
        self.directory.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("tier", ["ram", "file"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_was_saved_comes_back_and_is_forgotten(make: Callable[..., Any], tier: str, count: int) -> None:
    store, blocks = make(**{tier: 8}), random_blocks(count)
    assert store.save("a", blocks.clone())
    assert store.used_blocks == count
    settle(store)
    assert torch.equal(store.load("a"), blocks)
    assert wait_until(lambda: store.used_blocks == 0)
    with pytest.raises(KeyError):
        store.load("a")


def test_the_nearest_tier_that_has_room_takes_a_request_whole(make: Callable[..., Any]) -> None:
    store = make(ram=4, file=4)
    assert store.save("three", random_blocks(3)) and store.save("two", random_blocks(2))
    assert [tier.used_blocks for tier in store.tiers] == [3, 2]


def test_a_request_that_no_tier_holds_is_refused_and_nothing_is_kept(make: Callable[..., Any]) -> None:
    store = make(ram=2, file=2)
    assert not store.save("a", random_blocks(3))
    assert store.used_blocks == 0
    assert (
        store.save("a", random_blocks(2))
        and store.save("b", random_blocks(2))
        and not store.save("c", random_blocks(1))
    )
    assert store.save("nothing", random_blocks(0)), "no blocks need no room"


@pytest.mark.parametrize("direct", [True, False])
def test_a_request_in_scattered_slots_comes_back_in_order(make: Callable[..., Any], direct: bool) -> None:
    store = make(file=9, direct=direct)
    for i in range(9):
        assert store.save(str(i), random_blocks(1, i))
    for i in (7, 1, 4, 2):
        store.drop(str(i))
    assert wait_until(lambda: store.used_blocks == 5)
    blocks = random_blocks(4, 99)
    assert store.save("scattered", blocks.clone())
    settle(store)
    assert torch.equal(store.load("scattered"), blocks)
    assert torch.equal(store.load("5"), random_blocks(1, 5))


def test_blocks_that_are_no_multiple_of_a_sector_go_through_the_page_cache(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, 4, 1000)
    blocks = random_blocks(3)[:, :1000].contiguous()
    with implementation().OffloadStore([tier], 1000, CPU) as store:
        assert not tier.direct
        assert store.save("a", blocks.clone())
        settle(store)
        assert torch.equal(store.load("a"), blocks)


def test_a_request_larger_than_the_bounce_buffer(make: Callable[..., Any]) -> None:
    count = 2 * BOUNCE_BYTES // BLOCK + 3
    store, blocks = make(file=count), random_blocks(count)
    memory = torch.empty(count * BLOCK + 8192, dtype=torch.uint8)
    begin = 64 - memory.data_ptr() % 4096 + 4096
    unaligned = memory[begin : begin + count * BLOCK].view(count, BLOCK)
    assert store.save("a", unaligned.copy_(blocks))
    settle(store)
    assert torch.equal(store.load("a"), blocks)


def test_an_arena_moves_rows_as_a_list_would() -> None:
    arena, blocks = Arena(8, BLOCK, pin=False), random_blocks(4)
    slots = (1, 2, 5, 7)
    arena.write(slots, blocks)
    assert torch.equal(arena.rows[list(slots)], blocks)
    assert torch.equal(arena.read(slots, CPU), blocks)


def test_neighbours_move_together() -> None:
    assert list(stretches((1, 2, 3, 6, 8, 9))) == [(0, 1, 3), (3, 6, 1), (4, 8, 2)]
    assert list(stretches(())) == []


@pytest.mark.parametrize("tier", ["ram", "file"])
def test_no_memory_is_held_for_longer_than_it_must(make: Callable[..., Any], tier: str) -> None:
    store, blocks = make(**{tier: 8}), random_blocks(4)
    alive = weakref.ref(blocks)
    assert store.save("a", blocks)
    del blocks
    settle(store)
    if tier == "ram":
        store.drop("a")
    assert wait_until(lambda: alive() is None)


# Nobody waits (the framework fails these: it does one thing after the other)


def test_save_returns_before_the_disk_has_begun(make: Callable[..., Any], disk: Disk) -> None:
    store = make(file=8, disk=disk)
    before = disk.done["write"]
    disk.hold["write"] = threading.Event()
    store.save("a", random_blocks(4))
    assert disk.done["write"] == before and store.pending_bytes == 4 * BLOCK
    disk.hold["write"].set()
    settle(store)
    assert disk.done["write"] == before + 1, "four neighbours are one call"


def test_a_request_that_comes_back_before_it_was_written_needs_no_disk(make: Callable[..., Any], disk: Disk) -> None:
    store, blocks = make(file=8, disk=disk), [random_blocks(2, seed) for seed in range(3)]
    before, began = dict(disk.done), disk.begun["write"]
    disk.hold["write"] = threading.Event()
    for i, saved in enumerate(blocks):
        assert store.save(str(i), saved.clone())
    assert wait_until(lambda: disk.begun["write"] > began)
    for i, saved in enumerate(blocks):  # 0 is being written, 1 and 2 are not
        assert store.ready(str(i))
        assert torch.equal(store.load(str(i)), saved)
    assert store.used_blocks == 2, "those of the write that has begun"
    disk.hold["write"].set()
    settle(store)
    assert wait_until(lambda: store.used_blocks == 0)
    assert (disk.done["write"] - before["write"], disk.done["read"]) == (1, before["read"]), (
        "1 and 2 were never written"
    )


def test_what_was_prefetched_is_read_while_the_engine_computes(make: Callable[..., Any], disk: Disk) -> None:
    store, blocks = make(file=8, disk=disk), random_blocks(4)
    store.save("a", blocks.clone())
    settle(store)
    before, disk.hold["read"] = disk.done["read"], threading.Event()
    store.prefetch("a")
    store.prefetch("a")
    assert not store.ready("a")
    disk.hold["read"].set()
    assert wait_until(lambda: store.ready("a"))
    assert disk.done["read"] == before + 1
    assert torch.equal(store.load("a"), blocks)
    assert disk.done["read"] == before + 1


def test_a_read_does_not_queue_behind_writes(make: Callable[..., Any], disk: Disk) -> None:
    store, order = make(file=16, disk=disk), []
    store.save("first", random_blocks(1))
    settle(store)
    move = disk.move
    disk.move = lambda kind, *rest: (order.append(kind), move(kind, *rest))[1]  # type: ignore[method-assign]
    disk.hold["write"] = threading.Event()
    for i in range(3):
        store.save(str(i), random_blocks(1))
    assert wait_until(lambda: order == ["write"])
    store.prefetch("first")
    disk.hold["write"].set()
    settle(store)
    assert order == ["write", "read", "write", "write"]


def test_a_host_tensor_is_kept_and_not_copied(make: Callable[..., Any]) -> None:
    store, blocks = make(ram=4), random_blocks(4)
    address = blocks.data_ptr()
    store.save("a", blocks)
    assert store.load("a").data_ptr() == address


def test_what_is_dropped_before_it_was_written_is_never_written(make: Callable[..., Any], disk: Disk) -> None:
    store, before = make(file=8, disk=disk), disk.begun["write"]
    disk.hold["write"] = threading.Event()
    for key in ("begun", "waiting"):
        store.save(key, random_blocks(2))
    assert wait_until(lambda: disk.begun["write"] > before)
    store.drop("waiting")
    store.drop("begun")
    assert store.used_blocks == 2, "those of the write that has begun"
    disk.hold["write"].set()
    assert wait_until(lambda: store.used_blocks == 0)
    settle(store)
    assert disk.begun["write"] == before + 1


def test_staging_memory_is_bounded_and_save_waits_for_room(make: Callable[..., Any], disk: Disk) -> None:
    store = make(file=8, disk=disk, max_pending_bytes=2 * BLOCK)
    disk.hold["write"] = threading.Event()
    assert store.save("a", random_blocks(2))
    threading.Timer(0.1, disk.hold["write"].set).start()
    assert store.save("b", random_blocks(2)), "it waited until the disk had taken the first"
    assert store.pending_bytes <= 2 * BLOCK


def test_a_disk_that_does_not_answer_costs_patience_and_then_nothing(
    make: Callable[..., Any], disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(file=8, disk=disk, patience=0.1, max_pending_bytes=BLOCK)
    assert store.save("read", random_blocks(1))
    settle(store)
    disk.hold |= {"read": threading.Event(), "write": threading.Event()}
    began = time.monotonic()
    assert store.load("read") is None
    assert "request read" in caplog.text and "0.1 s" in caplog.text
    assert store.save("queued", random_blocks(1)), "its bytes wait behind the read that hangs"
    assert not store.save("too much", random_blocks(1))
    store.close()
    assert time.monotonic() - began < 1.5, "close waited for the disk"
    for event in disk.hold.values():
        event.set()


# A disk that fails: one request is lost, with a line in the log; all others are well


def loses_only_one(store: Any, caplog: pytest.LogCaptureFixture, cause: str) -> None:
    """Of a, b and c, three blocks each, b is gone."""
    assert torch.equal(store.load("a"), random_blocks(3, 1))
    assert store.load("b") is None
    assert torch.equal(store.load("c"), random_blocks(3, 3))
    assert wait_until(lambda: store.used_blocks == 0)
    (line,) = caplog.messages
    assert line.startswith("offload: request b ") and cause in line and "\n" not in line


def save_three(store: Any) -> None:
    for seed, key in enumerate("abc", start=1):
        assert store.save(key, random_blocks(3, seed))
        settle(store)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("kind", ["write", "read"])
def test_an_error_of_the_disk(
    make: Callable[..., Any], disk: Disk, caplog: pytest.LogCaptureFixture, kind: str, number: int
) -> None:
    store = make(file=9, disk=disk)
    assert store.save("a", random_blocks(3, 1))
    settle(store)
    if kind == "write":
        disk.fail["write"] = number
    assert store.save("b", random_blocks(3, 2))
    settle(store)
    disk.fail.clear()
    assert store.save("c", random_blocks(3, 3))
    settle(store)
    assert torch.equal(store.load("a"), random_blocks(3, 1))
    if kind == "read":
        disk.fail["read"] = number
    assert store.load("b") is None
    disk.fail.clear()
    assert torch.equal(store.load("c"), random_blocks(3, 3))
    (line,) = caplog.messages
    assert "request b" in line and "block 0 in slot 3" in line and "titan-kv-" in line and os.strerror(number) in line


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("short", [BLOCK, BLOCK + 512, 5000])
def test_a_short_transfer_is_continued(make: Callable[..., Any], disk: Disk, direct: bool, short: int) -> None:
    store, blocks = make(file=9, disk=disk, direct=direct), random_blocks(5)
    disk.short = short
    store.save("a", blocks.clone())
    settle(store)
    assert disk.done["write"] > 3
    assert torch.equal(store.load("a"), blocks)


def test_a_disk_that_moves_nothing_is_an_error_and_no_endless_loop(
    make: Callable[..., Any], disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(file=9, disk=disk)
    disk.short = 0
    assert store.save("a", random_blocks(3))
    settle(store)
    assert store.load("a") is None
    assert "0 of" in caplog.text


@proc
def test_a_flipped_bit(make: Callable[..., Any], disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    store = make(file=9, disk=disk)
    save_three(store)
    disk.damage(4, flipped)
    loses_only_one(store, caplog, "slot 4 of")


@proc
def test_the_tier_says_which_block_of_the_request_it_was(tmp_path: Path, disk: Disk) -> None:
    tier = FileTier(tmp_path, 9, BLOCK, calls=disk.calls)
    tier.write((3, 4, 7), random_blocks(3))
    disk.damage(7, flipped)
    with pytest.raises(LostBlockError, match=rf"^block 2 in slot 7 of {tier.path}: its bytes are not those"):
        tier.read((3, 4, 7), CPU)
    assert torch.equal(tier.read((3, 4), CPU), random_blocks(3)[:2])
    tier.close()


@proc
def test_a_block_from_the_wrong_place(make: Callable[..., Any], disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    store = make(file=9, disk=disk)
    save_three(store)
    disk.damage(4, lambda _: random_blocks(3, 3)[1].numpy().tobytes())
    loses_only_one(store, caplog, "not those that were written")


@proc
def test_a_block_of_an_earlier_owner_of_the_slot(
    make: Callable[..., Any], disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(file=9, disk=disk)
    old: list[bytes] = []
    for seed in (7, 2):
        assert store.save("b", random_blocks(3, seed))
        settle(store)
        disk.damage(1, lambda block: (old.append(block), old[0])[1])
        if seed == 7:
            store.drop("b")
    assert store.load("b") is None
    assert "slot 1 of" in caplog.text


@proc
def test_a_file_that_was_cut_off(make: Callable[..., Any], disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    store = make(file=6, disk=disk)
    for seed, key in enumerate("ab", start=1):
        assert store.save(key, random_blocks(3, seed))
        settle(store)
    descriptor = disk.open()
    os.ftruncate(descriptor, 4 * BLOCK + 100)
    os.close(descriptor)
    assert torch.equal(store.load("a"), random_blocks(3, 1))
    assert store.load("b") is None
    (line,) = caplog.messages
    assert "slot 4 of" in line
    assert store.save("c", random_blocks(6, 4)), "the file grows again"
    settle(store)
    assert torch.equal(store.load("c"), random_blocks(6, 4))


def test_the_directory_may_vanish(tmp_path: Path, make: Callable[..., Any]) -> None:
    store = make(file=9)
    save_three(store)
    assert not list(tmp_path.iterdir()), "the file has no name, so nothing is left by a process that is killed"
    tmp_path.rmdir()
    assert store.save("d", random_blocks(0)) and torch.equal(store.load("b"), random_blocks(3, 2))
    assert store.save("e", random_blocks(3, 5))
    settle(store)
    assert torch.equal(store.load("e"), random_blocks(3, 5))


def test_a_limit_of_the_system_on_the_size_of_files(tmp_path: Path) -> None:
    """A real EFBIG in the middle of a request, instead of a process that SIGXFSZ ends."""
    script = f"""
import logging, resource, torch
from pathlib import Path
from phase1_memory.tests.test_offload import BLOCK, CPU, FileTier, implementation, random_blocks, settle
logging.basicConfig(format="%(message)s")
with implementation().OffloadStore([FileTier(Path({str(tmp_path)!r}), 8, BLOCK)], BLOCK, CPU) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * BLOCK, resource.RLIM_INFINITY))
    assert store.save("a", random_blocks(4, 1)) and store.save("b", random_blocks(4, 2))
    settle(store)
    assert store.load("b") is None
    assert torch.equal(store.load("a"), random_blocks(4, 1))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "request b" in ran.stderr and "File too large" in ran.stderr


def can_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-Urm", "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own")
def test_a_disk_that_somebody_else_fills_up(tmp_path: Path) -> None:
    """A real ENOSPC on a file system that promised more than it has: the file is sparse."""
    script = f"""
import logging, os, torch
from pathlib import Path
from phase1_memory.tests.test_offload import BLOCK, CPU, FileCalls, FileTier, implementation, random_blocks, settle
logging.basicConfig(format="%(message)s")
there = Path({str(tmp_path)!r})
tier = FileTier(there, 16, BLOCK, calls=FileCalls(allocate=os.ftruncate))
with implementation().OffloadStore([tier], BLOCK, CPU) as store:
    assert store.save("a", random_blocks(4, 1))
    settle(store)
    other = (there / "other").open("wb", buffering=0)
    other.write(bytes(32 * BLOCK))
    assert store.save("b", random_blocks(4, 2))
    settle(store)
    os.unlink(there / "other"), other.close()
    assert store.save("c", random_blocks(4, 3))
    settle(store)
    assert store.load("b") is None
    assert torch.equal(store.load("a"), random_blocks(4, 1)) and torch.equal(store.load("c"), random_blocks(4, 3))
"""
    mount = f'mount -t tmpfs -o size={20 * BLOCK} none "$1" && exec "$2" -c "$3"'
    ran = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "request b" in ran.stderr and "No space left on device" in ran.stderr


# A user's mistake is one line


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"KV offload to .*need 4\.5e\+06 GB, .* GB are free .*offload_bytes"):
        FileTier(tmp_path, 1 << 40, BLOCK)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_the_file_is_made(tmp_path: Path) -> None:
    def full(descriptor: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left on device"):
        FileTier(tmp_path, 4, BLOCK, calls=FileCalls(allocate=full))
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: No such file or directory: give a directory"):
        FileTier(tmp_path / "nowhere", 4, BLOCK)


def test_a_file_system_that_refuses_direct_writes_gets_buffered_ones(tmp_path: Path) -> None:
    refused = []

    def write(descriptor: int, memory: list[memoryview], offset: int) -> int:
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.pwritev(descriptor, memory, offset)

    tier = FileTier(tmp_path, 4, BLOCK, calls=FileCalls(write=write))
    assert not tier.direct
    tier.write((1, 2), random_blocks(2))
    assert torch.equal(tier.read((1, 2), CPU), random_blocks(2))
    tier.close()


def test_memory_that_is_not_there() -> None:
    with pytest.raises(UserError, match="swap_bytes"):
        RamTier(1 << 40, BLOCK, pin=False)


@pytest.mark.parametrize(
    ("memory", "directory", "file", "message"),
    [
        (0, None, 0, "swap_bytes=0 and no offload_dir"),
        (BLOCK - 1, None, 0, "swap_bytes=4095 holds no KV block of 4096 bytes"),
        (0, "here", 10, "offload_bytes=10 holds no KV block"),
    ],
)
def test_sizes_that_make_no_store(memory: int, directory: str | None, file: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        implementation().open_store(BLOCK, CPU, memory, directory, file)


def test_a_store_by_the_sizes_of_its_tiers(tmp_path: Path) -> None:
    with implementation().open_store(BLOCK, CPU, 3 * BLOCK + 1, str(tmp_path), 5 * BLOCK) as store:
        assert [tier.capacity_blocks for tier in store.tiers] == [3, 5]
        assert store.save("a", random_blocks(4))
        assert store.describe().startswith("1 requests, memory 0/3 blocks, file in ")
    assert len(open_tiers(BLOCK, CPU, BLOCK, None, 0)) == 1


# A programmer's mistake is an exception


def test_misuse_is_not_swallowed(make: Callable[..., Any]) -> None:
    store = make(ram=4)
    store.save("a", random_blocks(1))
    with pytest.raises(ValueError, match="saved already"):
        store.save("a", random_blocks(1))
    with pytest.raises(ValueError, match="uint8"):
        store.save("b", random_blocks(1).float())
    with pytest.raises(ValueError, match="uint8"):
        store.save("b", random_blocks(1)[:, 1:])
    for call in (store.load, store.prefetch):
        with pytest.raises((KeyError, AssertionError)):
            call("unknown")
    store.drop("unknown")
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.save("c", random_blocks(1))


# The end


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@proc
def test_closing_gives_everything_back_whatever_is_pending(make: Callable[..., Any], disk: Disk) -> None:
    before = open_descriptors(), threading.active_count()
    store = make(file=16, disk=disk)
    disk.hold["write"] = threading.Event()
    threading.Timer(0.1, disk.hold["write"].set).start()
    for i in range(8):
        store.save(str(i), random_blocks(2))
    store.prefetch("3")
    store.close()
    store.close()
    assert wait_until(lambda: (open_descriptors(), threading.active_count()) == before)


@proc
def test_a_store_that_is_forgotten_closes_itself(tmp_path: Path) -> None:
    before = open_descriptors(), threading.active_count()
    store = implementation().OffloadStore([FileTier(tmp_path, 8, BLOCK)], BLOCK, CPU)
    store.save("a", random_blocks(4))
    del store
    gc.collect()
    assert wait_until(lambda: (open_descriptors(), threading.active_count()) == before)


def test_a_process_ends_although_its_store_was_not_closed(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from phase1_memory.tests.test_offload import BLOCK, CPU, FileTier, implementation, random_blocks
store = implementation().OffloadStore([FileTier(Path({str(tmp_path)!r}), 512, BLOCK)], BLOCK, CPU)
for i in range(64):
    store.save(str(i), random_blocks(8))
store.prefetch("3")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


# With a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tier", ["ram", "file"])
@pytest.mark.parametrize("prefetched", [True, False])
def test_on_cuda_copies_follow_the_kernels_that_fill_and_read_the_blocks(
    tmp_path: Path, tier: str, prefetched: bool
) -> None:
    device = torch.device("cuda")
    chosen = RamTier(64, BLOCK, pin=True) if tier == "ram" else FileTier(tmp_path, 64, BLOCK)
    busy = torch.randn(4096, 4096, device=device)
    with implementation().OffloadStore([chosen], BLOCK, device) as store:
        for round_ in range(10):
            wanted = random_blocks(32, round_).to(device)
            blocks = torch.empty_like(wanted)
            for _ in range(10):
                busy = torch.nn.functional.normalize(busy @ busy)  # so that the blocks are filled late
            blocks.copy_(wanted)
            assert store.save("a", blocks)
            del blocks
            torch.zeros(32, BLOCK, dtype=torch.uint8, device=device)  # may be given the memory of what was freed
            if prefetched:
                store.prefetch("a")
                assert wait_until(lambda: store.ready("a"))
            assert torch.equal(store.load("a"), wanted)
