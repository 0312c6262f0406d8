"""Seeds of requests, as `phase0_prototype.rng` derives them, without torch: the client needs them, and starts fast."""

from __future__ import annotations

_MASK = 2**64 - 1


def derive_seed(seed: int, index: int) -> int:
    """An independent seed for the index-th child: request i of an engine, output i of `n`.

    SplitMix64, as `phase0_prototype.rng.derive_seed` (a test holds them equal). The result is in [0, 2**63).
    """
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1
