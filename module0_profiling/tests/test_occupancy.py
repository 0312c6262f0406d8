"""Occupancy against values computed by hand from NVIDIA's table of limits."""

from __future__ import annotations

import pytest

from module0_profiling.occupancy import LIMITS, occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "fraction", "limiter"),
    [
        # 2048 / 256 = 8 blocks; 32 registers x 2048 threads is the whole file: full.
        ("sm_90", 256, 32, 0, 8, 1.0, "none (full)"),
        # 128 registers: 65536 / (128 * 256) = 2 blocks, 16 of 64 warps.
        ("sm_90", 256, 128, 0, 2, 0.25, "registers"),
        ("sm_120", 256, 128, 0, 2, 1 / 3, "registers"),
        # 33 registers a thread are 1056 a warp, rounded up to 1280: 51 warps, 48 in whole quarters, 6 blocks of 8.
        ("sm_80", 256, 33, 0, 6, 0.75, "registers"),
        # 16 threads still take a warp slot, and there are 32 block slots: 32 of 64 warps.
        ("sm_90", 16, 32, 0, 32, 0.5, "block slots"),
        ("sm_86", 32, 32, 0, 16, 1 / 3, "block slots"),
        # One block of 32 warps fits in 48 warp slots, a second does not.
        ("sm_120", 1024, 32, 0, 1, 2 / 3, "warp slots"),
        ("sm_75", 1024, 32, 0, 1, 1.0, "none (full)"),
        # 48 KB and the 1 KB that CUDA keeps: 164 / 49 = 3, 228 / 49 = 4, 100 / 49 = 2 blocks of 8 warps.
        ("sm_80", 256, 32, 48 * 1024, 3, 0.375, "shared memory"),
        ("sm_90", 256, 32, 48 * 1024, 4, 0.5, "shared memory"),
        ("sm_89", 256, 32, 48 * 1024, 2, 1 / 3, "shared memory"),
        # More shared memory than a block may have.
        ("sm_120", 128, 32, 100 * 1024, 0, 0.0, "shared memory"),
        # 255 registers, 65280 of a block of 256 threads, rounded up to 8192 a warp: one block.
        ("sm_90", 256, 255, 0, 1, 0.125, "registers"),
        ("sm_90a", 256, 32, 0, 8, 1.0, "none (full)"),
    ],
)
def test_occupancy_by_hand(
    arch: str, threads: int, registers: int, shared: int, blocks: int, fraction: float, limiter: str
) -> None:
    found = occupancy(arch, threads=threads, registers=registers, shared_bytes=shared)
    assert (found.blocks, found.limiter) == (blocks, limiter)
    assert found.fraction == pytest.approx(fraction)


def test_a_block_that_fits_exactly_is_counted_and_one_byte_more_is_not() -> None:
    most = LIMITS["sm_90"].shared_per_block
    assert occupancy("sm_90", threads=32, registers=16, shared_bytes=most).blocks == 1
    assert occupancy("sm_90", threads=32, registers=16, shared_bytes=most + 1).blocks == 0


def test_mistakes_are_one_line_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'sm_42': known are sm_75, sm_80"):
        occupancy("sm_42", threads=32, registers=16, shared_bytes=0)
    with pytest.raises(ValueError, match="1 to 1024 threads, not 2048"):
        occupancy("sm_90", threads=2048, registers=16, shared_bytes=0)
