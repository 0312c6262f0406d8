"""Phase 2's turn on a CPU: in one pass that also writes the cache, where tensors lie as it wants them."""

from __future__ import annotations

from torch import Tensor

from phase2_rope import rope
from phase2_rope.rope import rotate
from phase4_scheduler.kernels import cpu

__all__ = ["rotate", "rotate_and_write"]


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor],
    kv: tuple[Tensor, Tensor],
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `phase2_rope.rope.rotate_and_write`."""
    if interleaved or not cpu.can_turn(q, k, v, kv):
        return rope.rotate_and_write(q, k, v, rotary, slots, kv, interleaved=interleaved)
    cpu.turn_and_write(q, k, v, rotary, slots, kv)
    return q, k
