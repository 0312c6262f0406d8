"""Counts the instructions of a compiled kernel, from its machine code (SASS) or, failing that, from its PTX.

What the counts tell: ``LDG.E.128`` is a 128-bit load from global memory, four times fewer instructions than
``LDG.E``; FFMA against LDS says how much arithmetic one read of shared memory feeds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_SASS_KERNEL = re.compile(r"^\s*\.text\.(\S+):")
_SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_PTX_KERNEL = re.compile(r"^\s*(?:\.visible\s+)?\.entry\s+([\w$]+)")
_PTX_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][a-z0-9_]*(?:[.:]+[\w]+)+)\s")
_GLOBAL = re.compile(r"LDG(?:STS)?\b|ld\.global|cp\.async\.c[ag]|(?P<store>STG\b|st\.global)")
_PTX_MAX_THREADS = re.compile(r"^\s*\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?")


@dataclass(frozen=True)
class InstructionMix:
    """Opcodes of one kernel and how often each stands in its code (static: a loop body counts once).

    ``source`` is ``sass`` (what the GPU executes) or ``ptx`` (what the assembler was given).
    """

    source: str
    opcodes: Mapping[str, int]

    @property
    def total(self) -> int:
        """All instructions."""
        return sum(self.opcodes.values())

    @property
    def global_loads(self) -> int:
        """Loads from global memory into registers, of any width."""
        return self._count(r"LDG\b|ld\.global")

    @property
    def vector_loads(self) -> int:
        """128-bit (or wider) loads from global memory, asynchronous copies to shared memory included."""
        return self._count(
            r"(LDG|LDGSTS)\..*(128|256)\b|ld\.global.*\.(v4\.\w?32|v8\.\w?32|v2\.\w?64)|cp\.async.*global"
        )

    @property
    def vector_stores(self) -> int:
        """128-bit (or wider) stores to global memory."""
        return self._count(r"STG\..*(128|256)\b|st\.global.*\.(v4\.\w?32|v8\.\w?32|v2\.\w?64)")

    @property
    def async_copies(self) -> int:
        """Copies from global to shared memory that pass by the registers (cp.async)."""
        return self._count(r"LDGSTS\b|cp\.async\.c[ag]")

    @property
    def shared_loads(self) -> int:
        """Loads from shared memory, of any width."""
        return self._count(r"LDS\b|LDSM\b|ld\.shared|ldmatrix")

    @property
    def shared_stores(self) -> int:
        """Stores to shared memory, of any width."""
        return self._count(r"STS\b|st\.shared")

    @property
    def ffma(self) -> int:
        """float32 multiply-adds on the CUDA cores (FFMA2 does two)."""
        return self._count(r"FFMA\b|FFMA32I\b|fma\.rn(\.ftz)?\.f32\b") + 2 * self._count(r"FFMA2\b")

    @property
    def bulk_copies(self) -> int:
        """Copies of whole tiles by the copy engine (TMA: cp.async.bulk), from Hopper on."""
        return self._count(r"UBLKCP\b|UTMA(LDG|STG)\b|cp\.async\.bulk(?!\.(commit|wait))")

    @property
    def global_widths(self) -> dict[int, tuple[int, int]]:
        """Bits of an access -> (loads, stores) of global memory; copies by cp.async count as loads."""
        found: dict[int, list[int]] = {}
        for opcode, count in self.opcodes.items():
            if match := _GLOBAL.match(opcode):
                store = match["store"] is not None
                found.setdefault(_width_of(opcode), [0, 0])[store] += count
        return {bits: (loads, stores) for bits, (loads, stores) in sorted(found.items())}

    @property
    def mma(self) -> int:
        """Matrix instructions of one warp (mma.sync), from Turing on."""
        return self._count(r"[HIQBDO]MMA\b|mma\.sync")

    @property
    def wgmma(self) -> int:
        """Matrix instructions of four warps together that read shared memory themselves (wgmma), Hopper only."""
        return self._count(r"[HIQB]GMMA\b|wgmma\.mma")

    @property
    def tcgen05(self) -> int:
        """Matrix instructions of data centre Blackwell (tcgen05.mma), whose sums lie in tensor memory."""
        return self._count(r"UTC\w*MMA\b|tcgen05\.mma")

    @property
    def tensor_core(self) -> int:
        """Matrix instructions on the tensor cores of any generation."""
        return self.mma + self.wgmma + self.tcgen05

    def _count(self, pattern: str) -> int:
        opcode = re.compile(pattern)
        return sum(n for name, n in self.opcodes.items() if opcode.match(name))


def from_sass(listing: str) -> dict[str, InstructionMix]:
    """One mix a kernel from the output of ``nvdisasm``."""
    return _collect(listing, "sass", _SASS_KERNEL, _SASS_INSTRUCTION)


def from_ptx(ptx: str) -> dict[str, InstructionMix]:
    """One mix a kernel from PTX text."""
    return _collect(ptx, "ptx", _PTX_KERNEL, _PTX_INSTRUCTION)


def max_threads(ptx: str) -> dict[str, int]:
    """Threads a block that each kernel declares (``__launch_bounds__`` in CUDA C++, ``num_warps`` in Triton)."""
    found: dict[str, int] = {}
    kernel = ""
    for line in ptx.splitlines():
        if match := _PTX_KERNEL.match(line):
            kernel = match[1]
        elif (match := _PTX_MAX_THREADS.match(line)) and kernel:
            x, y, z = (int(size) if size else 1 for size in match.groups())
            found[kernel] = x * y * z
    return found


def _width_of(opcode: str) -> int:
    """Bits that a thread moves: LDG.E.128, ld.global.v4.b32. SASS says nothing of 32, and cp.async.cg has 128 only."""
    if match := re.search(r"\.v(\d)\.\w?(\d+)\b", opcode):
        return int(match[1]) * int(match[2])
    if opcode.startswith("cp.async.cg"):
        return 128
    if match := re.search(r"\.[USBF]?(8|16|32|64|128|256)\b", opcode):
        return int(match[1])
    return 32


def _collect(
    text: str, source: str, kernel: re.Pattern[str], instruction: re.Pattern[str]
) -> dict[str, InstructionMix]:
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in text.splitlines():
        if match := kernel.match(line):
            current = counts.setdefault(match[1], Counter())
        elif current is not None and (match := instruction.match(line)):
            current[match[1]] += 1
    return {name: InstructionMix(source, dict(opcodes)) for name, opcodes in counts.items()}
