"""The far tier: blocks in one file, on NVMe if there is some.

The file is allocated in full when it is made, so that a disk that is too small says so at the start. It has no name
from its first moment on: whatever happens to the process, the system takes the space back.

Each block has a CRC-32 that is kept in memory and compared when the block is read. Because the sums are not in the
file, a block that was never written, an older one, and one from the wrong place are found just like a flipped bit:
neither needs a stamp of its own. (zlib's CRC-32 is as fast as the disk. A universal sum in numpy is somewhat faster and
needs random keys of twice a block's size; `offload_cases.checksums` measures both.)

Where the file system takes it, the file is opened past the page cache (O_DIRECT). The page cache would be a second copy
in the memory that was too small to begin with. `offload_cases.tiers` measures both ways.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from phase0_prototype.errors import UserError
from phase1_memory.offload_tiers import FreeSlots, LostBlockError, RamTier, Slots, Stretch, Tier, host_blocks, stretches

ALIGNMENT = 4096  # O_DIRECT wants memory, offset and length in multiples of the disk's sector: 512 or 4096
BOUNCE_BYTES = 4 << 20  # what is not aligned goes through so much memory that is
Transfer = Callable[[int, list[memoryview], int], int]  # os.preadv and os.pwritev: descriptor, memory, offset -> bytes


def _allocate(descriptor: int, nbytes: int) -> None:
    """Give the file its blocks on the disk; only its length, where the system has no such call."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, nbytes)


@dataclass(frozen=True)
class FileCalls:
    """What the tier asks of the operating system; a test gives it a disk that fails."""

    allocate: Callable[[int, int], None] = _allocate
    write: Transfer = os.pwritev
    read: Transfer = os.preadv


class FileTier:
    """See the module.

    Args:
        directory: on the disk to use; the file in it is ours alone (0600) and nameless.
        capacity_blocks: slots, at least one.
        block_bytes: bytes of a KV block, all layers.
        direct: past the page cache, if the file system can and `block_bytes` is a multiple of 4096.
        calls: the operating system.

    Attributes:
        path: the name that the file had, for messages.
        direct: whether it is past the page cache.

    Raises:
        UserError: the directory can't be used, or the disk has too little room.
    """

    waits = True

    def __init__(
        self,
        directory: Path,
        capacity_blocks: int,
        block_bytes: int,
        *,
        direct: bool = True,
        calls: FileCalls | None = None,
    ) -> None:
        if capacity_blocks < 1 or block_bytes < 1:
            raise ValueError(f"capacity_blocks={capacity_blocks}, block_bytes={block_bytes}: both must be at least 1")
        self.capacity_blocks, self.block_bytes = capacity_blocks, block_bytes
        self.path = Path(directory) / f"titan-kv-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._calls = calls or FileCalls()
        self._free = FreeSlots(capacity_blocks)
        self._sums: dict[int, int] = {}  # slot: CRC-32 of what was written
        self._descriptor = self._create()
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._bounce = host_blocks(max(1, BOUNCE_BYTES // block_bytes), block_bytes, pin=False)
        self.direct = direct and block_bytes % ALIGNMENT == 0 and self._bypass_page_cache()

    @property
    def used_blocks(self) -> int:
        """Slots that are taken."""
        return self._free.used

    def take(self, num_blocks: int) -> Slots | None:
        """See `Tier`."""
        return self._free.take(num_blocks)

    def write(self, slots: Slots, blocks: Tensor) -> None:
        """See `Tier`."""
        for row, slot in enumerate(slots):
            self._sums[slot] = zlib.crc32(_bytes_of(blocks[row]))
        bounce = self._bounce if self.direct and blocks.data_ptr() % ALIGNMENT else None
        for stretch in stretches(slots):
            if bounce is None:
                self._transfer(self._calls.write, blocks, stretch)
                continue
            for row, slot, length in _pieces(stretch, len(bounce)):
                np.copyto(bounce[:length].numpy(), blocks[row : row + length].numpy())  # torch would use all cores
                self._transfer(self._calls.write, bounce, Stretch(0, slot, length), row)

    def read(self, slots: Slots, device: torch.device) -> Tensor:
        """See `Tier`."""
        blocks = host_blocks(len(slots), self.block_bytes, pin=device.type == "cuda")
        for stretch in stretches(slots):
            self._transfer(self._calls.read, blocks, stretch)
        for row, slot in enumerate(slots):
            if zlib.crc32(_bytes_of(blocks[row])) != self._sums.get(slot):
                raise LostBlockError(f"{self._name(row, slot)}: its bytes are not those that were written")
        return blocks.to(device, non_blocking=True)

    def free(self, slots: Slots) -> None:
        """See `Tier`."""
        for slot in slots:
            self._sums.pop(slot, None)
        self._free.free(slots)

    def describe(self) -> str:
        """See `Tier`."""
        way = "direct" if self.direct else "page cache"
        return f"file in {self.path.parent} ({way}) {self.used_blocks}/{self.capacity_blocks} blocks"

    def close(self) -> None:
        """See `Tier`."""
        self._close()

    def _create(self) -> int:
        wanted = self.capacity_blocks * self.block_bytes
        where = f"KV offload to {self.path.parent}"
        try:
            free = _free_bytes(self.path.parent)
            if wanted > free:  # asked first: a disk that was filled to its end by the attempt harms others
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise self._no_room(where, wanted, error) from None
        try:
            self.path.unlink()
            self._calls.allocate(descriptor, wanted)
        except OSError as error:
            os.close(descriptor)
            raise self._no_room(where, wanted, error) from None
        return descriptor

    def _no_room(self, where: str, wanted: int, error: OSError) -> UserError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(f"{where}: {error.strerror}: give a directory on a local disk that can be written")
        with contextlib.suppress(OSError):
            free = f"{_free_bytes(self.path.parent) / 1e9:.3g} GB are free"
            return UserError(
                f"{where}: {self.capacity_blocks} blocks need {wanted / 1e9:.3g} GB, {free} ({error.strerror}): lower "
                "offload_bytes, or give a directory on another disk"
            )
        return UserError(f"{where}: {error.strerror}: give a directory on another disk")

    def _bypass_page_cache(self) -> bool:
        """Switch the page cache off and try it: some file systems only refuse when something is written."""
        try:
            import fcntl

            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except (ImportError, AttributeError, OSError):
            return False
        block = _bytes_of(self._bounce[0])
        try:
            self._calls.write(self._descriptor, [block], 0)
            self._calls.read(self._descriptor, [block], 0)
        except OSError:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
            return False
        return True

    def _transfer(self, call: Transfer, blocks: Tensor, stretch: Stretch, first_row: int = 0) -> None:
        """All bytes of a stretch of `blocks`, in one call if the system can. What it moved in part is continued.

        `first_row`: row of the request that row 0 of `blocks` is.
        """
        row, slot, length = stretch
        memory = _bytes_of(blocks[row : row + length])
        done = 0
        while done < len(memory):
            try:
                moved = call(self._descriptor, [memory[done:]], slot * self.block_bytes + done)
                if self.direct and done + moved < len(memory):
                    moved -= moved % ALIGNMENT  # goes on from where a sector begins
                if moved <= 0:
                    raise OSError(errno.EIO, f"{done} of {len(memory)} bytes were moved, then no more")
            except OSError as error:
                failed = done // self.block_bytes
                name = self._name(first_row + row + failed, slot + failed)
                raise LostBlockError(f"{name}: {error.strerror or error}") from error
            done += moved

    def _name(self, row: int, slot: int) -> str:
        return f"block {row} in slot {slot} of {self.path}"


def open_tiers(
    block_bytes: int, device: torch.device, memory_bytes: int, directory: str | Path | None, file_bytes: int
) -> list[Tier]:
    """The tiers of so many bytes, nearest first.

    Args:
        block_bytes: bytes of a KV block, all layers.
        device: of the KV cache.
        memory_bytes: host memory; 0: none.
        directory: of the file; None: no file.
        file_bytes: its size.

    Raises:
        UserError: one of them is not available, too small for a block, or there is none.
    """
    if not memory_bytes and directory is None:
        raise UserError("swap_bytes=0 and no offload_dir: give one of them, or preempt by recompute")
    wanted = {"swap_bytes": memory_bytes} if memory_bytes else {}
    wanted |= {} if directory is None else {"offload_bytes": file_bytes}
    for name, nbytes in wanted.items():
        if nbytes < block_bytes:
            raise UserError(f"{name}={nbytes} holds no KV block of {block_bytes} bytes: raise it")
    tiers: list[Tier] = []
    if memory_bytes:
        tiers.append(RamTier(memory_bytes // block_bytes, block_bytes, pin=device.type == "cuda"))
    if directory is not None:
        tiers.append(FileTier(Path(directory), file_bytes // block_bytes, block_bytes))
    return tiers


def _free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _pieces(stretch: Stretch, most: int) -> Iterator[Stretch]:
    """A stretch in pieces of at most `most` blocks."""
    row, slot, length = stretch
    for begin in range(0, length, most):
        yield Stretch(row + begin, slot + begin, min(most, length - begin))


def _bytes_of(blocks: Tensor) -> memoryview:
    return blocks.view(-1).numpy().data
