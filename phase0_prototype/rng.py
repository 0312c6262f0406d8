"""Random numbers without a state: a hash of (seed, position, token id).

A generator that is drawn from in turn makes a request's output depend on who else is in the batch. Here each number is
a function of where it is used: the request's seed, the index of the token being chosen and the candidate token. So a
request repeats itself alone or in any batch, after preemption, in chunks, on CPU and GPU, and when a draft is verified
with the noise that plain sampling would have used.

The hash is SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014): a counter times an
odd constant, then xor-shifts and multiplications. The counter is the token id; where it starts comes from seed and
position. On numbers that are functions of a counter: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase0_prototype.seeds import GOLDEN, MULTIPLY_1, MULTIPLY_2

# torch has no unsigned 64-bit arithmetic: the constants are the published ones as signed numbers; products wrap alike.
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = (constant - 2**64 for constant in (GOLDEN, MULTIPLY_1, MULTIPLY_2))
# (bits + 1/2) / 2**31, shrunk by one float32 step: 2**31 - 1 rounds up to 2**31, and the result must stay below 1.
_TO_UNIT = 2.0**-31 * (1 - 2.0**-24)


def uniform(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Uniform float32 numbers strictly between 0 and 1, finest near 0.

    Args:
        seeds: [B] int64.
        positions: [B] int64, index of the generated token in its output.
        token_ids: [K] or [B, K] int64, the candidates.

    Returns:
        [B, K] float32 on the device of the arguments, the same bits on every device.
    """
    stream = _mix(_mix(seeds) + positions)  # [B]
    return _to_unit(_scramble(stream[:, None] + token_ids * _GOLDEN))


def gumbel(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise [B, K] float32: the argmax of logits + noise is a sample of softmax(logits).

    The largest values decide, so they come from the end of `uniform` that has the finest steps (near 0, 2**-32):
    with 128k tokens, ties are as rare as one in 10,000. Arguments as for `uniform`.
    """
    return uniform(seeds, positions, token_ids).neg_().log1p_().neg_().log_().neg_()


def _scramble(x: Tensor) -> Tensor:
    """SplitMix64's finaliser without its last xor-shift, in place: that one only improves the low bits."""
    x ^= (x >> 30).bitwise_and_(2**34 - 1)  # the mask makes the arithmetic shift a logical one
    x *= _MULTIPLY_1
    x ^= (x >> 27).bitwise_and_(2**37 - 1)
    x *= _MULTIPLY_2
    return x


def _mix(x: Tensor) -> Tensor:
    """A full SplitMix64 step: neighbours in, unrelated numbers out."""
    x = _scramble(x + _GOLDEN)
    return x ^ ((x >> 31) & (2**33 - 1))


def _to_unit(x: Tensor) -> Tensor:
    """The 31 highest bits as a float32 in (0, 1)."""
    return (x >> 33).bitwise_and_(2**31 - 1).to(torch.float32).add_(0.5).mul_(_TO_UNIT)
