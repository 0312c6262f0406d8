"""Theoretical occupancy: how many warps of a kernel fit on one streaming multiprocessor (SM) at once.

An SM hands out four things by the block: warp slots, block slots, registers and shared memory. Whichever runs out
first limits the number of resident blocks. Occupancy is resident warps over warp slots. It is a means of hiding
latency, not a goal: a kernel with much work per thread can be fastest at 25 %.

Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability", and ``cuda_occupancy.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTER_UNIT = 256  # registers are given to a warp in units of 256
SUB_PARTITIONS = 4  # the register file is four separate quarters; a warp lives in one of them
MAX_REGISTERS_PER_THREAD = 255
KIB = 1024


@dataclass(frozen=True)
class ArchLimits:
    """What one SM has to give. Sizes in bytes; ``reserved_shared`` is what CUDA takes from every block."""

    arch: str
    name: str
    max_threads: int
    max_blocks: int
    shared_per_sm: int
    shared_per_block: int
    registers: int = 65536
    shared_unit: int = 128
    reserved_shared: int = 1 * KIB


_LIMITS = (
    ArchLimits("sm_75", "Turing: T4", 1024, 16, 64 * KIB, 64 * KIB, shared_unit=256, reserved_shared=0),
    ArchLimits("sm_80", "Ampere: A100", 2048, 32, 164 * KIB, 163 * KIB),
    ArchLimits("sm_86", "Ampere: RTX 3090, A10", 1536, 16, 100 * KIB, 99 * KIB),
    ArchLimits("sm_87", "Ampere: Jetson Orin", 1536, 16, 164 * KIB, 163 * KIB),
    ArchLimits("sm_89", "Ada: RTX 4090, L4, L40S", 1536, 24, 100 * KIB, 99 * KIB),
    ArchLimits("sm_90", "Hopper: H100, H200", 2048, 32, 228 * KIB, 227 * KIB),
    ArchLimits("sm_100", "Blackwell: B200", 2048, 32, 228 * KIB, 227 * KIB),
    ArchLimits("sm_103", "Blackwell: B300", 2048, 32, 228 * KIB, 227 * KIB),
    ArchLimits("sm_120", "Blackwell: RTX 5090, RTX PRO 6000", 1536, 24, 100 * KIB, 99 * KIB),
)
LIMITS = {limits.arch: limits for limits in _LIMITS}


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks and warps of one SM; ``fraction`` in 0..1; ``limiter`` names what runs out first."""

    blocks: int
    warps: int
    fraction: float
    limiter: str


def limits_of(arch: str) -> ArchLimits:
    """Limits of ``sm_90`` (``sm_90a`` too); raises ValueError that lists the known ones."""
    found = LIMITS.get(arch.rstrip("af"))
    if found is None:
        raise ValueError(f"unknown architecture {arch!r}: known are {', '.join(LIMITS)}")
    return found


def occupancy(arch: str, *, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Occupancy of a kernel of ``threads`` a block, ``registers`` a thread and ``shared_bytes`` a block on ``arch``.

    A block that does not fit at all has 0 blocks and a limiter that says why. Raises ValueError for threads outside
    1..1024.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"a block has 1 to 1024 threads, not {threads}")
    limits = limits_of(arch)
    warps_per_block = -(-threads // WARP)
    max_warps = limits.max_threads // WARP
    candidates = {
        "block slots": limits.max_blocks,
        "warp slots": max_warps // warps_per_block,
        "registers": _blocks_by_registers(limits, warps_per_block, registers),
        "shared memory": _blocks_by_shared(limits, shared_bytes),
    }
    limiter = min(candidates, key=lambda what: candidates[what])
    warps = candidates[limiter] * warps_per_block
    if warps == max_warps:
        limiter = "none (full)"
    return Occupancy(warps // warps_per_block, warps, warps / max_warps, limiter)


def _blocks_by_registers(limits: ArchLimits, warps_per_block: int, registers: int) -> int:
    if registers == 0:
        return limits.max_blocks
    if registers > MAX_REGISTERS_PER_THREAD:
        return 0
    per_warp = _round_up(registers * WARP, REGISTER_UNIT)
    warps = limits.registers // SUB_PARTITIONS // per_warp * SUB_PARTITIONS
    return warps // warps_per_block


def _blocks_by_shared(limits: ArchLimits, shared_bytes: int) -> int:
    if shared_bytes > limits.shared_per_block:
        return 0
    per_block = _round_up(shared_bytes + limits.reserved_shared, limits.shared_unit)
    return limits.shared_per_sm // per_block if per_block else limits.max_blocks


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
