"""Which tile the latent kernel has on which GPU: found by compiling, see `mla_kernel_cases`.

What decides is room for sums and queries. Sums of 64 rows are half of an SM's registers, and its queries take 73 KB of
shared memory, of 99 on sm_86, 89 and 120. Hopper multiplies with operands in shared memory; where `mma.sync` does, they
pass through registers, and 64 rows leave room for 16 keys. A packed latent passes through registers in any case: that
leaves room for 16 rows there, and on sm_100, which copies its sums to registers and back.

Three stages are two tiles in flight beside the one in use; `mma.sync` frees that one's memory for the second.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

WIDEST_LATENT, WIDEST_ROPE = 512, 64  # that the tiles are made for
HARDWARE_E4M3 = (8, 9)  # the first GPUs that convert it


@dataclass(frozen=True)
class LatentTile:
    """What a program of the latent kernel holds.

    Attributes:
        rows: (new token, head) pairs.
        keys: cached tokens that it reads at a time.
        warps, stages: of the launch.
        blocks: that an SM holds at once.
        hardware: whether the GPU converts e4m3 itself.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    blocks: int
    hardware: bool = True

    @property
    def label(self) -> str:
        """As in "64x32, 8 warps, 3 stages"."""
        return f"{self.rows}x{self.keys}, {self.warps} warps, {self.stages} stage{'s' if self.stages > 1 else ''}"


@dataclass(frozen=True)
class Cut:
    """How the planner shall cut a step into items.

    Attributes:
        tokens: new tokens of a tile.
        group, head_tiles: heads of a tile, and tiles that hold all of them: what G and Hkv are to `plan_work`.
        block_n: cached tokens that a program reads at a time.
        programs: that run at once.
    """

    tokens: int
    group: int
    head_tiles: int
    block_n: int
    programs: int


_ONE = LatentTile(16, 32, 4, 3, 2)
_Tiles = dict[bool, tuple[LatentTile, ...]]  # by whether entries are packed
_HOPPER: _Tiles = {
    False: (_ONE, LatentTile(32, 32, 8, 3, 1), LatentTile(64, 32, 8, 3, 1)),
    True: (_ONE, LatentTile(64, 32, 8, 3, 1)),
}
_BLACKWELL: _Tiles = {False: (_ONE, LatentTile(32, 32, 8, 3, 1), LatentTile(64, 16, 8, 3, 1)), True: (_ONE,)}
_A100: _Tiles = {
    False: (LatentTile(16, 32, 4, 3, 1), LatentTile(32, 32, 8, 3, 1), LatentTile(64, 16, 8, 3, 1)),
    True: (LatentTile(16, 32, 4, 3, 1),),
}
_SMALL: _Tiles = {  # 99 KB
    False: (LatentTile(16, 32, 4, 3, 1), LatentTile(32, 16, 8, 3, 1)),
    True: (LatentTile(16, 32, 4, 3, 1),),
}
_WIDE = (LatentTile(16, 16, 4, 1, 1),)  # float32 is for tests
_INTERPRETED = tuple(LatentTile(rows, 32, 1, 1, 8) for rows in (16, 32, 64))  # few and large operations


@functools.lru_cache
def tiles_of(capability: tuple[int, int] | None, packed: bool, itemsize: int = 2) -> tuple[LatentTile, ...]:
    """Tiles for a GPU, from few rows to many.

    Args:
        capability: of the GPU; None: the interpreter.
        packed: whether entries are FP8.
        itemsize: bytes of a number of q.
    """
    if capability is None:
        return _INTERPRETED
    found: tuple[LatentTile, ...] = _WIDE
    if itemsize == 2:
        found = {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _A100 if capability == (8, 0) else _SMALL)[packed]
    return tuple(replace(tile, hardware=capability >= HARDWARE_E4M3) for tile in found)


def tile_for(rows: int, tiles: tuple[LatentTile, ...]) -> LatentTile:
    """The smallest tile that holds so many rows, or the largest."""
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


@functools.lru_cache
def fitting(heads: int, tokens: int, tiles: tuple[LatentTile, ...]) -> tuple[LatentTile, int]:
    """The tile for so many tokens with all heads, or with the largest equal part of them that fits; and that part."""
    tile = tile_for(heads * tokens, tiles)
    group = next(n for n in range(min(heads, tile.rows // tokens), 0, -1) if heads % n == 0)
    return tile, group
