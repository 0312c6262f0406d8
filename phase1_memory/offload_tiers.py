"""Where the bytes of a swapped-out request lie: what a tier is, and the nearest one, host memory.

A tier has slots of one block each. It hands them out, fills them, reads them back and takes them back; when any of this
happens is the store's business (offload.py). The other tier is a file (offload_file.py).

On CUDA, whatever reads or writes a tier queues its copies on one stream (`Lane`), beside the model's kernels.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import psutil
import torch
from torch import Tensor

from phase0_prototype.errors import UserError

Slots = tuple[int, ...]
PAGE = 4096


class LostBlockError(Exception):
    """A block cannot be read back as it was written. The message names block, slot, file and cause."""


LOSSES = (LostBlockError, OSError, MemoryError, torch.OutOfMemoryError)
"""What may go wrong with a request's bytes: it costs the request a recomputation, and nobody else anything."""


class Tier(Protocol):
    """What the store needs. Every method may be called from the engine's thread and from the store's."""

    capacity_blocks: int
    block_bytes: int
    waits: bool  # whether write and read wait for a slow device, so that a thread should call them

    @property
    def used_blocks(self) -> int:
        """Slots that are taken."""
        ...

    def take(self, num_blocks: int) -> Slots | None:
        """Slots for so many blocks in ascending order, or None where fewer are free."""
        ...

    def write(self, slots: Slots, blocks: Tensor) -> None:
        """Fill the slots.

        Args:
            slots: as `take` gave them.
            blocks: [len(slots), block_bytes] uint8, which the tier may keep; where it `waits`, in host memory.

        Raises:
            LOSSES: the slots hold nothing then; they are still taken.
        """
        ...

    def read(self, slots: Slots, device: torch.device) -> Tensor:
        """[len(slots), block_bytes] uint8 on `device`; on CUDA, complete for what follows on the current stream.

        Raises:
            LOSSES: a block is not what was written.
        """
        ...

    def free(self, slots: Slots) -> None:
        """Take the slots back."""
        ...

    def describe(self) -> str:
        """Kind, place and fill, in a few words."""
        ...

    def close(self) -> None:
        """Give everything back to the system; the tier is not used afterwards."""
        ...


class FreeSlots:
    """Which slots are free. The lowest go first, so that a request's blocks lie side by side and move in few calls."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._fresh = 0  # slots from here on were never taken
        self._returned: list[int] = []  # a heap
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Slots that are taken."""
        return self._fresh - len(self._returned)

    def take(self, count: int) -> Slots | None:
        """See `Tier`."""
        with self._lock:
            if count > self.capacity - self.used:
                return None
            again = [heapq.heappop(self._returned) for _ in range(min(count, len(self._returned)))]
            begin, self._fresh = self._fresh, self._fresh + count - len(again)
            return (*again, *range(begin, self._fresh))

    def free(self, slots: Slots) -> None:
        """See `Tier`."""
        with self._lock:
            for slot in slots:
                heapq.heappush(self._returned, slot)


class Stretch(NamedTuple):
    """Rows row .. row + length - 1 of a request go to, or come from, slots slot .. slot + length - 1."""

    row: int
    slot: int
    length: int


def stretches(slots: Sequence[int]) -> Iterator[Stretch]:
    """Slots that are neighbours, in order: each moves in one piece."""
    begin = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[row - 1] + 1:
            yield Stretch(begin, slots[begin], row - begin)
            begin = row


def host_blocks(num_blocks: int, block_bytes: int, *, pin: bool) -> Tensor:
    """[num_blocks, block_bytes] uint8 in host memory, from the start of a page. Raises MemoryError."""
    padding = 0 if pin else PAGE  # pinned memory begins at a page, and is rounded up to a power of two
    try:
        memory = torch.empty(num_blocks * block_bytes + padding, dtype=torch.uint8, pin_memory=pin)
    except RuntimeError as error:
        raise MemoryError(f"no {num_blocks * block_bytes} bytes of host memory: {error}") from None
    begin = -memory.data_ptr() % PAGE if padding else 0
    return memory[begin : begin + num_blocks * block_bytes].view(num_blocks, block_bytes)


class Lane:
    """Where copies run: on CUDA, a stream beside the model's; elsewhere a copy has ended when its call returns.

    It is one stream for both directions, so that a slot is never written before what was in it has been read.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def open(self, source: Tensor | None = None) -> Iterator[None]:
        """Copies inside run on the lane: of `source`, when the current stream has filled it; it outlives them."""
        if self.stream is None:
            yield
            return
        if source is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            source.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def mark(self, tensor: Tensor) -> Copy:
        """The tensor, which is complete when all that is queued so far has been done."""
        return Copy(tensor, None if self.stream is None else self.stream.record_event())


@dataclass(frozen=True)
class Copy:
    """A tensor that is complete once the event, if any, has happened."""

    tensor: Tensor
    event: torch.cuda.Event | None = None

    @property
    def arrived(self) -> bool:
        """Whether it is complete."""
        return self.event is None or self.event.query()

    def on_current_stream(self) -> Tensor:
        """The tensor, for kernels launched from now on."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.event)
            self.tensor.record_stream(stream)
        return self.tensor

    def on_host(self) -> Tensor:
        """The tensor, for the CPU."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


class Arena:
    """One tensor, allocated once. Where it is pinned, a GPU copies to and from it while the CPU does other things.

    Attributes:
        rows: [capacity_blocks, block_bytes] uint8.
    """

    def __init__(self, capacity_blocks: int, block_bytes: int, pin: bool) -> None:
        self.rows = torch.empty(capacity_blocks, block_bytes, dtype=torch.uint8, pin_memory=pin)

    def write(self, slots: Slots, blocks: Tensor) -> None:
        """Copy; on CUDA this is queued on the current stream."""
        for row, slot, length in stretches(slots):
            self.rows[slot : slot + length].copy_(blocks[row : row + length], non_blocking=True)

    def read(self, slots: Slots, device: torch.device) -> Tensor:
        """A new tensor; on CUDA the copies are queued on the current stream."""
        blocks = torch.empty(len(slots), self.rows.shape[1], dtype=torch.uint8, device=device)
        for row, slot, length in stretches(slots):
            blocks[row : row + length].copy_(self.rows[slot : slot + length], non_blocking=True)
        return blocks

    def free(self, slots: Slots) -> None:
        """Nothing to do: the next write goes over it, and a stream keeps the order."""


class Kept:
    """The staging tensors themselves: where the engine runs in host memory, its gather was the copy."""

    def __init__(self) -> None:
        self._tensors: dict[Slots, Tensor] = {}

    def write(self, slots: Slots, blocks: Tensor) -> None:
        """Keep; what lies on another device than the CPU is brought over first."""
        self._tensors[slots] = blocks.cpu()

    def read(self, slots: Slots, device: torch.device) -> Tensor:
        """The same tensor again."""
        return self._tensors[slots].to(device)

    def free(self, slots: Slots) -> None:
        """Let go of it."""
        self._tensors.pop(slots, None)


class RamTier:
    """Host memory.

    Args:
        capacity_blocks: slots, at least one.
        block_bytes: bytes of a KV block, all layers.
        pin: allocate all of it now, pinned, for a CUDA device. Otherwise the capacity is counted, and the memory of a
            request is its staging tensor.

    Raises:
        UserError: where so much memory is not available.
    """

    waits = False

    def __init__(self, capacity_blocks: int, block_bytes: int, pin: bool) -> None:
        if capacity_blocks < 1 or block_bytes < 1:
            raise ValueError(f"capacity_blocks={capacity_blocks}, block_bytes={block_bytes}: both must be at least 1")
        self.capacity_blocks, self.block_bytes = capacity_blocks, block_bytes
        wanted, free = capacity_blocks * block_bytes, psutil.virtual_memory().available
        if wanted > free:
            raise UserError(
                f"KV offload to memory: {capacity_blocks} blocks need {wanted / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
                "available: lower swap_bytes"
            )
        self._free = FreeSlots(capacity_blocks)
        self._memory: Arena | Kept = Arena(capacity_blocks, block_bytes, pin=True) if pin else Kept()

    @property
    def used_blocks(self) -> int:
        """Slots that are taken."""
        return self._free.used

    def take(self, num_blocks: int) -> Slots | None:
        """See `Tier`."""
        return self._free.take(num_blocks)

    def write(self, slots: Slots, blocks: Tensor) -> None:
        """See `Tier`."""
        self._memory.write(slots, blocks)

    def read(self, slots: Slots, device: torch.device) -> Tensor:
        """See `Tier`."""
        return self._memory.read(slots, device)

    def free(self, slots: Slots) -> None:
        """See `Tier`."""
        self._memory.free(slots)
        self._free.free(slots)

    def describe(self) -> str:
        """See `Tier`."""
        return f"memory {self.used_blocks}/{self.capacity_blocks} blocks"

    def close(self) -> None:
        """See `Tier`."""
        self._memory = Kept()
