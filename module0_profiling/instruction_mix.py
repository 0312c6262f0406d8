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
    def tensor_core(self) -> int:
        """Matrix instructions on the tensor cores (mma.sync, wgmma, tcgen05.mma)."""
        return self._count(r"[HIQB]MMA\b|[HIQ]GMMA\b|UTC\w*MMA\b|mma\.sync|wgmma\.mma|tcgen05\.mma")

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
