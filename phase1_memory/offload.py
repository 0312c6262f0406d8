"""When a swapped-out request's bytes move: the store that the scheduler talks to.

Where blocks run out, the scheduler gathers those of a request into one tensor, hands it to the store and frees them;
later it gets a tensor back and scatters it into other blocks. Tiers (offload_tiers.py, offload_file.py) are tried in
order, nearest first. The engine must not wait for a disk, so:

* A write to a file happens behind its back, in a thread. Until it has ended the bytes are still in memory, and a
  request that comes back that early takes them from there.
* `prefetch` begins to read before the request has its turn. Reads go before writes that have not begun.
* On CUDA, copies run on a stream of their own beside the model's kernels.

Whatever happens to a request's bytes, that request is the only one that notices, and it only has to be computed again.

The idea is that of swapping in vLLM (Kwon et al., 2023, arXiv 2309.06180, section 4.5), with a file behind it as in
LMCache and SGLang's HiCache.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from phase1_memory.offload_file import open_tiers
from phase1_memory.offload_tiers import LOSSES, Copy, Lane, Slots, Tier, host_blocks

log = logging.getLogger(__name__)


class OffloadStore:
    """Keeps the blocks of requests that were swapped out. Its methods are called from one thread, the engine's.

    Args:
        tiers: nearest first; the store owns them and closes them.
        block_bytes: bytes of a KV block, all layers.
        device: where `load` puts the blocks.
        max_pending_bytes: staging memory that may wait for a file; beyond it `save` waits for the disk.
        patience: seconds that any call waits at most. A disk that takes longer is taken for dead.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        block_bytes: int,
        device: torch.device,
        *,
        max_pending_bytes: int = 1 << 28,
        patience: float = 30.0,
    ) -> None:
        for tier in tiers:
            if tier.block_bytes != block_bytes:
                raise ValueError(
                    f"{tier.describe()} has blocks of {tier.block_bytes} bytes, the store of {block_bytes}"
                )
        self.tiers, self.block_bytes, self.device = tuple(tiers), block_bytes, device
        self.patience = patience
        self._entries: dict[str, _Entry] = {}
        self._lane = Lane(device)
        self._worker = _Worker(max_pending_bytes, partial(_close, self.tiers))
        self._shut_down = weakref.finalize(self, self._worker.close, patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def used_blocks(self) -> int:
        """Slots that are taken, in all tiers."""
        return sum(tier.used_blocks for tier in self.tiers)

    @property
    def pending_bytes(self) -> int:
        """Staging memory that waits for a file."""
        return self._worker.pending_bytes

    def save(self, key: str, blocks: Tensor) -> bool:
        """Take over a request's blocks.

        Args:
            key: names the request until it is loaded or dropped.
            blocks: [n, block_bytes] uint8, contiguous, on the store's device; it belongs to the store from now on. On
                CUDA the current stream may still be filling it.

        Returns:
            False where no tier has room: the store keeps nothing then.
        """
        self._check(key, blocks)
        if not len(blocks):
            self._entries[key] = _Entry(None, (), coming=_settled(partial(Copy, blocks)))
            return True
        for tier in self.tiers:
            slots = tier.take(len(blocks))
            if slots is None:
                continue
            try:
                self._entries[key] = self._write(tier, slots, blocks)
                return True
            except LOSSES as error:
                tier.free(slots)
                log.warning("offload: request %s can't be saved to %s: %s", key, tier.describe(), error)
        return False

    def prefetch(self, key: str) -> None:
        """Begin to bring a request's blocks to the device; again does nothing.

        Their memory there is the caller's to think of: no more requests than will be resumed next.
        """
        entry = self._entries[key]
        if entry.coming is None:
            entry.coming = self._recall(entry)

    def ready(self, key: str) -> bool:
        """Whether `load` would return at once, be it with nothing."""
        entry = self._entries[key]
        if entry.coming is None:
            return entry.is_near and self._lane.stream is None
        return entry.coming.done() and (entry.coming.exception() is not None or entry.coming.result().arrived)

    def load(self, key: str) -> Tensor | None:
        """Hand back a request's blocks and forget them.

        Returns:
            [n, block_bytes] uint8 on the device, or None where they are lost: the log says why, in one line.
        """
        self.prefetch(key)
        coming = self._entries.pop(key).coming
        assert coming is not None
        try:
            return coming.result(self.patience).on_current_stream()
        except LOSSES as error:
            coming.cancel()
            cause = str(error) or f"the disk has not answered for {self.patience:g} s"
            log.warning("offload: request %s is computed again: %s", key, cause)
            return None

    def drop(self, key: str) -> None:
        """Forget a request's blocks. Names that are unknown, or known no more, are ignored."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.coming is not None:
            entry.coming.cancel()
        elif entry.tier is not None:
            entry.writing.cancel()
            _when_done(entry.writing, partial(entry.tier.free, entry.slots))

    def close(self) -> None:
        """Forget everything, end the thread and close the tiers; also done when nobody refers to the store any more."""
        self._entries.clear()
        self._shut_down()

    def describe(self) -> str:
        """Tiers and their fill, in a line."""
        return ", ".join([f"{len(self._entries)} requests", *(tier.describe() for tier in self.tiers)])

    def _check(self, key: str, blocks: Tensor) -> None:
        if not self._shut_down.alive:
            raise RuntimeError(f"save({key!r}) after the store was closed")
        if key in self._entries:
            raise ValueError(f"request {key!r} is saved already: load or drop it first")
        shaped = blocks.dim() == 2 and blocks.shape[1] == self.block_bytes and blocks.is_contiguous()
        if not shaped or blocks.dtype != torch.uint8:
            raise ValueError(
                f"blocks are {blocks.dtype} {list(blocks.shape)}: a contiguous uint8 [n, {self.block_bytes}] is wanted"
            )

    def _write(self, tier: Tier, slots: Slots, blocks: Tensor) -> _Entry:
        if not tier.waits:
            with self._lane.open(blocks):
                tier.write(slots, blocks)
            return _Entry(tier, slots)
        host = self._to_host(blocks)
        writing = self._worker.write(partial(_write, tier, slots, host), blocks.nbytes, self.patience)
        entry = _Entry(tier, slots, host, writing)
        _when_done(writing, entry.forget_host)
        return entry

    def _to_host(self, blocks: Tensor) -> Copy:
        if self._lane.stream is None:
            return Copy(blocks.cpu())
        with self._lane.open(blocks):
            return self._lane.mark(host_blocks(*blocks.shape, pin=True).copy_(blocks, non_blocking=True))

    def _recall(self, entry: _Entry) -> Future[Copy]:
        """Fetch the entry from where it is, and free its slots once nothing is read from or written to them."""
        tier, slots, host = entry.tier, entry.slots, entry.host
        assert tier is not None
        last: Future[Any]
        if host is not None:  # its write has not ended, and need not
            entry.writing.cancel()
            last, coming = entry.writing, _settled(partial(_to_device, self._lane, host, self.device))
        elif entry.writing.exception() is not None:
            last = coming = entry.writing
        else:
            job = partial(_read, self._lane, tier, slots, self.device)
            last = coming = self._worker.read(job) if tier.waits else _settled(job)
        _when_done(last, partial(tier.free, slots))
        return coming


def open_store(
    block_bytes: int, device: torch.device, memory_bytes: int, directory: str | Path | None, file_bytes: int
) -> OffloadStore:
    """A store with a tier in host memory, if `memory_bytes`, and one in a file, if there is a `directory` for it.

    Raises:
        UserError: see `open_tiers`.
    """
    return OffloadStore(open_tiers(block_bytes, device, memory_bytes, directory, file_bytes), block_bytes, device)


# What the worker and the futures refer to is outside of the store, so that a store that nobody refers to is collected.


def _settled(job: Callable[[], Any]) -> Future[Any]:
    """The future of a job that is done now, in this thread."""
    future: Future[Any] = Future()
    try:
        future.set_result(job())
    except LOSSES as error:
        future.set_exception(error)
    return future


@dataclass
class _Entry:
    """Where a request's blocks are.

    Attributes:
        host: set as long as they are being written: then they are here as well.
        coming: set once they were asked for; the slots are nobody's concern from then on.
    """

    tier: Tier | None
    slots: Slots
    host: Copy | None = None
    writing: Future[Any] = field(default_factory=lambda: _settled(lambda: None))
    coming: Future[Copy] | None = None

    @property
    def is_near(self) -> bool:
        """Whether no disk stands between."""
        return self.host is not None or (self.tier is not None and not self.tier.waits)

    def forget_host(self) -> None:
        self.host = None


def _when_done(future: Future[Any], call: Callable[[], None]) -> None:
    future.add_done_callback(lambda _: call())


def _write(tier: Tier, slots: Slots, host: Copy) -> None:
    tier.write(slots, host.on_host())


def _read(lane: Lane, tier: Tier, slots: Slots, device: torch.device) -> Copy:
    with lane.open():
        return lane.mark(tier.read(slots, device))


def _to_device(lane: Lane, host: Copy, device: torch.device) -> Copy:
    with lane.open():
        return lane.mark(host.tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class _Job:
    call: Callable[[], Any]
    nbytes: int
    future: Future[Any] = field(default_factory=Future)


class _Worker:
    """One thread, begun at the first job. Writes (jobs with bytes) are done in order, reads before them.

    The thread is a daemon: neither a disk that does not answer nor a store that nobody closed keeps the process alive.

    Args:
        max_pending_bytes: of writes; one alone may have more.
        at_end: called once no job runs any more.
    """

    def __init__(self, max_pending_bytes: int, at_end: Callable[[], None]) -> None:
        self.pending_bytes, self._most, self._at_end = 0, max_pending_bytes, at_end
        self._reads: deque[_Job] = deque()
        self._writes: deque[_Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def read(self, call: Callable[[], Any]) -> Future[Any]:
        """Queue a read."""
        with self._changed:
            return self._queue(self._reads, _Job(call, 0))

    def write(self, call: Callable[[], Any], nbytes: int, patience: float) -> Future[Any]:
        """Queue a write; raises TimeoutError where the queue has no room for it within `patience` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_room(nbytes), patience):
                raise TimeoutError(f"the disk took none of {self.pending_bytes} waiting bytes for {patience:g} s")
            return self._queue(self._writes, _Job(call, nbytes))

    def close(self, patience: float) -> None:
        """Give up what has not begun, and wait for what has, but no longer than `patience`."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._reads.clear()
            self._writes.clear()
            self._changed.notify_all()
        if self._thread is None:
            self._at_end()
        elif self._thread is not threading.current_thread():  # which a garbage collection may happen in
            self._thread.join(patience)
            if self._thread.is_alive():
                log.warning("offload: the disk has not answered for %g s; its file is closed when it does", patience)

    def _has_room(self, nbytes: int) -> bool:
        return not self.pending_bytes or self.pending_bytes + nbytes <= self._most

    def _queue(self, jobs: deque[_Job], job: _Job) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-offload", daemon=True)
            self._thread.start()
        jobs.append(job)
        self.pending_bytes += job.nbytes
        self._changed.notify_all()
        return job.future

    def _run(self) -> None:
        while (job := self._next()) is not None:
            _do(job)
            with self._changed:
                self.pending_bytes -= job.nbytes
                self._changed.notify_all()
            del job  # holds a request's bytes, and the next may be long in coming
        self._at_end()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._reads or self._writes)
            return None if self._closed else (self._reads or self._writes).popleft()


def _do(job: _Job) -> None:
    if job.future.set_running_or_notify_cancel():
        try:
            job.future.set_result(job.call())
        except BaseException as error:  # whatever it is, it belongs to who waits for the result
            job.future.set_exception(error)


def _close(tiers: Sequence[Tier]) -> None:
    for tier in tiers:
        tier.close()
