"""A seed from another: those of requests and of their n outputs. No torch: a server's process needs it.

SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014), the hash of rng.py.
"""

from __future__ import annotations

GOLDEN = 0x9E3779B97F4A7C15  # the published constants
MULTIPLY_1 = 0xBF58476D1CE4E5B9
MULTIPLY_2 = 0x94D049BB133111EB
_MASK64 = 2**64 - 1


def derive_seed(seed: int, index: int) -> int:
    """An independent seed for the index-th child: request i of an engine, output i of `n`.

    Both are any integers; the result is in [0, 2**63).
    """
    state = (seed + (index + 1) * GOLDEN) & _MASK64
    state = ((state ^ (state >> 30)) * MULTIPLY_1) & _MASK64
    state = ((state ^ (state >> 27)) * MULTIPLY_2) & _MASK64
    return (state ^ (state >> 31)) >> 1
