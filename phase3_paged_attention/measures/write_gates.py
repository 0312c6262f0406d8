"""What the gates ask of the write that turns and quantises: is it right, and which bytes does it move on a GPU's path?

On a GPU the layers hand over the table of cosines and sines and each token's row, and so does this, in Triton's
interpreter. Bytes are those of the kernel's own addresses, and of every torch operation beside it: what it reads and
what it writes, for on tensors larger than caches each operation goes to memory and back.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from module0_profiling.course.parts import Use, resolve
from phase2_rope.kernels import counts
from phase3_paged_attention.kernels.trace import Trace
from phase3_paged_attention.kv_format import E4M3, FORMATS, KVFormat
from phase3_paged_attention.measures.interpreted import ROOM, answer
from phase3_paged_attention.measures.write_checks import HALF_STEP, SMALLEST

PER_TOKEN = FORMATS["fp8_per_token_head"]
CASES = (
    (E4M3, counts.Case(5, 4, 2, 32, 32, dtype=torch.float32)),
    (FORMATS["fp8_e5m2"], counts.Case(3, 3, 1, 48, 24, interleaved=True, dtype=torch.float32)),
    (PER_TOKEN, counts.Case(9, 2, 2, 40, 24, dtype=torch.float16)),
    (PER_TOKEN, counts.Case(3, 4, 2, 32, 32, interleaved=True, dtype=torch.float32)),
)
COUNTED = counts.Case(32, 8, 2, 64, 64, dtype=torch.float16)
ROUNDINGS = 8  # to the model's type that may add up, where a turn is not made in float32
SCALE = 0.005  # of e4m3: what is beyond 2.24 is cut off


def write(use: Use) -> dict[str, Any]:
    """`error`: largest over what half a step of the format allows; `bytes`: over the fewest; `operations` of torch."""
    part = resolve(ROOM, "kernels.quantise", use)
    inputs, kv = _inputs(PER_TOKEN, COUNTED)
    whole = {"qkv": inputs.activation, "keys": kv[0], "values": kv[1], "k_scale": kv[2], "v_scale": kv[3]}
    with Trace({**whole, "table": inputs.cos_sin, "positions": inputs.positions}) as trace, Moved() as moved:
        _write(part, inputs, kv)
    return {
        "error": max(_error(part, *case) for case in CASES),
        "bytes": (trace.bytes() + moved.bytes) / _fewest(COUNTED),
        "operations": moved.count,
    }


class Moved(TorchDispatchMode):
    """Counts the torch operations inside a `with` that move numbers, and their bytes.

    An index reads what it picks, and writes that only. Launches of Triton are not torch's: see `Trace`.
    """

    NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "set_")  # made or pointed at, not moved

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation that reaches a device."""
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if func.is_view or name in self.NOTHING:
            return out
        if name == "copy_" and args[0].data_ptr() == args[1].data_ptr():  # the interpreter, behind a launch
            return out
        self.count += 1
        if name.startswith("index_put"):
            self.bytes += _bytes(args[1]) + 2 * _bytes(args[2])
        elif name.startswith("index"):
            self.bytes += _bytes(args[1:]) + 2 * _bytes(out)
        else:
            self.bytes += _bytes((args, kwargs)) + _bytes(out)
        return out


def _bytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))


def _fewest(case: counts.Case) -> int:
    """q there and back, k and v in, a byte a number and scales out, cosines and sines, row and slot of each token."""
    q, kv = case.q_heads * case.dim, 2 * case.k_heads * case.dim
    return case.tokens * ((2 * q + kv) * case.dtype.itemsize + kv + 4 * 2 * case.k_heads + 4 * case.rotated + 3 * 8)


def _inputs(kind: KVFormat, case: counts.Case) -> tuple[counts.Inputs, tuple[Tensor, ...]]:
    inputs = counts.Inputs.of(case)
    shape = inputs.keys.shape
    kv = [torch.full(shape, 0x7F, dtype=torch.uint8).view(kind.dtype) for _ in "kv"]  # NaN in both formats
    scales = [torch.full(shape[:3], float("nan")) if kind.per_token else torch.tensor([SCALE]) for _ in "kv"]
    return inputs, (*kv, *scales)


def _write(part: ModuleType, inputs: counts.Inputs, kv: tuple[Tensor, ...]) -> Tensor:
    where = (inputs.cos_sin, inputs.positions, inputs.slots)
    q: Tensor = part.rotate_quantise_write(*inputs.qkv, *where, kv, interleaved=inputs.case.interleaved)
    return q


def _error(part: ModuleType, kind: KVFormat, case: counts.Case) -> float:
    inputs, kv = _inputs(kind, case)
    q, *exact = counts.exact("rope_fast", inputs)  # float64, in the cache's slots
    slack = ROUNDINGS * torch.finfo(case.dtype).eps / 2  # of the largest of a head
    worst = _most((_write(part, inputs, kv).double() - q).abs() / (slack * q.abs().amax(-1, keepdim=True)))
    there = torch.zeros(kv[0].shape[:2], dtype=torch.bool)
    there[inputs.slots] = True
    for stored, own, true in zip(kv[:2], kv[2:], exact, strict=True):
        scale = own[there].double() if kind.per_token else own.double()  # [T, Hkv] or [1]
        true = true[there]  # [T, Hkv, D]
        largest, end = true.abs().amax(-1, keepdim=True), kind.largest * scale[..., None]
        if kind.per_token:
            worst = max(worst, _most((end - largest).abs() / (slack * largest)))
        got = stored[there].double() * scale[..., None]
        allowed = true.abs() * HALF_STEP[kind.dtype] + scale[..., None] * SMALLEST[kind.dtype] + slack * largest
        worst = max(worst, _most((got - true.clamp(-end, end)).abs() / allowed))
        if bool((stored.view(torch.uint8)[~there] != 0x7F).any()):  # somebody else's
            return float("inf")
    return worst


def _most(off: Tensor) -> float:
    return float(off.nan_to_num(nan=float("inf")).max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer({"write": write}, sys.argv[1:])
