"""A ladder: one operation, several kernels of it in one ``.cu`` file, from the plain one to the fastest.

The file itself says how each kernel is launched, in two comment lines above it, so that host code, tests and reports
cannot disagree with it:

    // adds: what this version has that the one before had not
    // launch: tile 128x64, block 256        rows x columns of the result a block computes; threads of a block
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_VERSION = re.compile(
    r"// adds: (?P<adds>[^\n]+)\n"
    r"// launch: tile (?P<rows>\d+)x(?P<cols>\d+), block (?P<x>\d+)(?:x(?P<y>\d+))?[ \t]*\n"
    r'(?://[^\n]*\n)*extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(?P<name>\w+)\('
)


@dataclass(frozen=True)
class Version:
    """One kernel: its name, what it adds, the part of the result that a block computes, and its threads (x, y)."""

    name: str
    adds: str
    tile_rows: int
    tile_cols: int
    block: tuple[int, int]

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Blocks (x, y) that cover ``rows`` x ``cols``, the ragged edge included."""
        return -(-cols // self.tile_cols), -(-rows // self.tile_rows)


def read(source: Path) -> tuple[Version, ...]:
    """The versions of a ``.cu`` file in order; raises ValueError when a kernel lacks its two lines."""
    text = source.read_text()
    versions = tuple(
        Version(m["name"], m["adds"], int(m["rows"]), int(m["cols"]), (int(m["x"]), int(m["y"] or 1)))
        for m in _VERSION.finditer(text)
    )
    kernels = text.count('extern "C" __global__')
    if kernels != len(versions):
        raise ValueError(f"{source.name}: {kernels} kernels but {len(versions)} with '// adds:' and '// launch:' above")
    return versions


def find(source: Path, name: str) -> Version:
    """The version called ``name``; raises ValueError that lists those of the file."""
    versions = read(source)
    for version in versions:
        if version.name == name:
            return version
    raise ValueError(f"{source.name} has no kernel {name!r}: it has {', '.join(v.name for v in versions)}")
