"""Tiles of the paged kernel, by GPU, head dim and bytes of a cached number: a table, found by compiling for six GPUs.

What decides, read from the compiled code and never timed on the GPU of a user:

    no spills, and shared memory that the GPU has: 99 KB (sm_86, 89, 120), 163 (sm_80) or 227 (sm_90, 100)
    16-byte copies in the background: of `stages` tiles one is multiplied, the others are on their way
    a decode moves bytes: several blocks on an SM, tiles of 8 to 16 KB for each of K and V
    a prompt multiplies: 128 rows (64 where D = 256 fills the registers), one block of 8 warps on an SM
"""

from __future__ import annotations

from dataclasses import dataclass, replace

LARGE, MIDDLE, SMALL = "large", "middle", "small"  # shared memory of the GPU
DECODE_ROWS = 32  # up to here a tile is a decode's
Capability = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """What one program holds.

    Attributes:
        block_n: cached tokens that it reads at a time.
        warps, stages: of the build.
        blocks: that an SM runs at once.
    """

    block_n: int
    warps: int
    stages: int
    blocks: int = 1


# Rows of a tile -> GPU -> the power of two that holds D -> in 16 bits, in FP8.
_TILES: dict[int, dict[str, dict[int, tuple[Tile, Tile]]]] = {
    16: {
        LARGE: {
            64: (Tile(128, 4, 3, 3), Tile(128, 4, 3, 4)),
            128: (Tile(64, 4, 3, 3), Tile(64, 4, 3, 4)),
            256: (Tile(32, 4, 3, 3), Tile(32, 4, 3, 3)),
        },
        MIDDLE: {
            64: (Tile(64, 4, 3, 4), Tile(64, 4, 3, 4)),
            128: (Tile(64, 4, 3, 2), Tile(64, 4, 3, 4)),
            256: (Tile(32, 4, 3, 2), Tile(32, 4, 3, 3)),
        },
        SMALL: {
            64: (Tile(64, 4, 3, 2), Tile(64, 4, 3, 4)),
            128: (Tile(32, 4, 3, 2), Tile(64, 4, 3, 2)),
            256: (Tile(16, 4, 3, 2), Tile(32, 4, 3, 2)),
        },
    },
    64: {
        LARGE: {
            64: (Tile(64, 4, 3, 3), Tile(64, 4, 3, 2)),
            128: (Tile(64, 4, 3, 2), Tile(32, 4, 3, 2)),
            256: (Tile(32, 8, 3, 1), Tile(16, 8, 3, 1)),
        },
        MIDDLE: {
            64: (Tile(64, 4, 3, 3), Tile(32, 4, 3, 2)),
            128: (Tile(32, 4, 3, 2), Tile(32, 4, 3, 2)),
            256: (Tile(32, 8, 3, 1), Tile(32, 8, 3, 1)),
        },
        SMALL: {
            64: (Tile(64, 4, 3, 1), Tile(32, 4, 3, 2)),
            128: (Tile(32, 4, 3, 1), Tile(16, 4, 3, 2)),
            256: (Tile(16, 8, 3, 1), Tile(32, 8, 3, 1)),
        },
    },
    128: {
        LARGE: {
            64: (Tile(64, 8, 3, 2), Tile(64, 8, 3, 1)),
            128: (Tile(64, 8, 3, 1), Tile(64, 8, 3, 1)),
        },
        MIDDLE: {
            64: (Tile(64, 8, 3, 1), Tile(64, 8, 3, 1)),
            128: (Tile(64, 8, 3, 1), Tile(32, 8, 3, 1)),
        },
        SMALL: {
            64: (Tile(64, 8, 3, 1), Tile(64, 8, 3, 1)),
            128: (Tile(64, 8, 3, 1), Tile(32, 8, 3, 1)),
        },
    },
}
_FLOAT32 = Tile(16, 4, 3, 1)  # no tensor core: for tests on a GPU
_INTERPRETER = Tile(32, 1, 1, 4)


def tile_of(capability: Capability | None, dim: int, block_m: int, stored: int = 2, query: int = 2) -> Tile:
    """The tile for these sizes.

    Args:
        capability: of the GPU; None: there is none, the interpreter runs.
        dim: D, up to 256.
        block_m: rows of a tile of queries.
        stored, query: bytes of a number in the cache and of q.
    """
    if capability is None:
        return _INTERPRETER
    if query == 4:
        return _FLOAT32
    width = max(64, 1 << (dim - 1).bit_length())
    rows = 16 if block_m <= DECODE_ROWS else most_rows(dim) if block_m > 64 else 64
    tile = _TILES[rows][memory_of(capability)][width][stored == 1]
    if 16 < block_m <= DECODE_ROWS:  # warps share rows, so each number of FP8 is taken apart twice
        most = 64 if stored == 1 else tile.block_n
        return replace(tile, block_n=min(tile.block_n, most), blocks=min(tile.blocks, 1 if dim > 128 else 2))
    return tile


def most_rows(dim: int, query: int = 2) -> int:
    """Rows of the tallest tile; float32 has no tensor cores, and taller ones spill."""
    return 16 if query == 4 else 64 if dim > 128 else 128


def rows_of(group: int, query_len: int, dim: int, query: int = 2) -> int:
    """Rows of a tile for a sequence with this many new tokens, of `group` heads each: 16, 64 or 128, or the group's."""
    wanted = group * query_len
    return max(group, min(16 if wanted <= 16 else 64 if wanted <= 64 else 128, most_rows(dim, query)))


def memory_of(capability: Capability) -> str:
    """The class of a GPU by its shared memory; unknown ones are taken for small."""
    if capability in ((9, 0), (10, 0), (10, 3)):
        return LARGE
    return MIDDLE if capability in ((8, 0), (8, 7)) else SMALL
