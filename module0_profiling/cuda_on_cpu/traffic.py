"""What a kernel did to memory, counted on the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """One kind of access to one memory.

    ``accesses``: loads or stores of single threads; ``bytes`` they asked for; ``requests``: instructions of whole
    warps; ``transactions``: 32-byte sectors (global) or wavefronts (shared) that those need; ``ideal``: the fewest
    that could carry the same bytes.
    """

    accesses: int
    bytes: int
    requests: int
    transactions: int
    ideal: int

    @property
    def overhead(self) -> float:
        """Transactions over the ideal: 1.0 is coalesced (global) or free of bank conflicts (shared)."""
        return self.transactions / self.ideal if self.ideal else 1.0


@dataclass(frozen=True)
class Traffic:
    """Counts of one launch. ``out_of_bounds`` and ``misaligned`` are bugs: a GPU may fault or corrupt there."""

    global_loads: Memory
    global_stores: Memory
    shared_loads: Memory
    shared_stores: Memory
    out_of_bounds: int
    misaligned: int

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory above the ideal."""
        pairs = (self.shared_loads, self.shared_stores)
        return sum(side.transactions - side.ideal for side in pairs)


class CMemory(ctypes.Structure):
    """``Side`` of runtime.cpp."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("accesses", "bytes", "requests", "transactions", "ideal")]

    def freeze(self) -> Memory:
        """The same numbers as plain data."""
        return Memory(self.accesses, self.bytes, self.requests, self.transactions, self.ideal)


class CTraffic(ctypes.Structure):
    """``Counts`` of runtime.cpp."""

    _fields_ = [
        *((name, CMemory) for name in ("global_loads", "global_stores", "shared_loads", "shared_stores")),
        ("out_of_bounds", ctypes.c_uint64),
        ("misaligned", ctypes.c_uint64),
    ]

    def freeze(self) -> Traffic:
        """The same numbers as plain data."""
        return Traffic(
            self.global_loads.freeze(),
            self.global_stores.freeze(),
            self.shared_loads.freeze(),
            self.shared_stores.freeze(),
            int(self.out_of_bounds),
            int(self.misaligned),
        )
