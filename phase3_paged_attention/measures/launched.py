"""What a kernel compiles to on a GPU that is not here, whoever wrote it: its launch is taken down, and nothing runs.

Tensors are shapes on a device that pretends to be a GPU (torch's fake tensors), so a part chooses its tile as it would
there. From the arguments of the launch follows what Triton would compile: types, constants, and which numbers are
multiples of 16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from module0_profiling.course.parts import Use, resolve
from module0_profiling.triton_compile import DIVISIBILITY, TritonBuild, compile_triton
from phase0_prototype.attention import AttentionSpec
from phase3_paged_attention.measures.interpreted import ROOM, answer
from phase3_paged_attention.work_list import Work

SMS = 132
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
DECODE, PROMPT = (1, 4096), (512, 512)  # new tokens of a sequence, and all of them
COMPILED = (("sm_80", DECODE), ("sm_90", DECODE), ("sm_120", DECODE), ("sm_90", PROMPT))
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.uint16: "u16", torch.int8: "i8", torch.int16: "i16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
INT32 = range(-(2**31), 2**31)


def spills(use: Use) -> dict[str, Any]:
    """Bytes that `kernels.paged` spills in bfloat16, by step, kernel and architecture."""
    paged, found = resolve(ROOM, "kernels.paged", use), {}
    for arch, (new, length) in COMPILED:
        number = int(arch.removeprefix("sm_"))
        for build in taken_down(partial(_attend, paged, new, length), (number // 10, number % 10)):
            binary, _ = compile_triton(build, arch)
            spilled = [r.spill_store_bytes + r.spill_load_bytes for r in binary.resources.values()]
            found[f"{new} new, {build.label}, {arch}"] = sum(spilled)
    return found


def taken_down(launch: Callable[[], object], capability: tuple[int, int]) -> list[TritonBuild]:
    """Builds of the kernels that a function launches on a GPU of this compute capability.

    Args:
        launch: makes its tensors on "cuda", and launches.
        capability: of the GPU.
    """
    from triton.runtime.jit import JITFunction

    taken: list[TritonBuild] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        taken.append(_build(kernel, arguments, named))

    with _as_if_on(capability), patch.object(JITFunction, "run", note), FakeTensorMode(), _Slices():
        launch()
    return taken


class _Slices(TorchFunctionMode):
    """`x[a:b]` as a view, without the GPU that Python's indexing asks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        view = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")[index]
        return x.as_strided(view.shape, view.stride(), view.storage_offset())


@contextmanager
def _as_if_on(capability: tuple[int, int]) -> Iterator[None]:
    properties = SimpleNamespace(multi_processor_count=SMS, major=capability[0], minor=capability[1])
    with (
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
    ):
        yield


def _build(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> TritonBuild:
    names = list(kernel.arg_names)
    options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
    given = {**dict(zip(names, arguments, strict=False)), **{name: named[name] for name in names if name in named}}
    given |= {p.name: p.default for p in kernel.params if p.has_default and p.name not in given}
    constants, signature, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            constants[name] = value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % DIVISIBILITY == 0 and not fixed):
            divisible.append(name)
    return TritonBuild(kernel.__name__, kernel, signature, constants, tuple(divisible), **options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if value in INT32 else "i64"
    return "fp32"


def _attend(paged: Any, new: int, length: int) -> None:
    spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5, dtype=torch.bfloat16)
    device = torch.device("cuda")
    on = partial(torch.empty, device=device, dtype=torch.int32)
    tokens = paged.tokens_of(spec, device, new)
    paged.programs_of(spec, device, tokens)
    work = Work(on(64, 6), on(8, 4), on(8 * KV_HEADS), tokens, 64)
    blocks = length // PAGE
    kv = tuple(on(blocks, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16) for _ in "kv")
    q = on(new, HEADS + 2 * KV_HEADS, DIM, dtype=torch.bfloat16)[:, :HEADS]
    paged.attend(q, kv, paged.Tables(on(2), on(1), on(1, blocks)), work, scale=spec.scale)


if __name__ == "__main__":
    answer({"spills": spills}, sys.argv[1:])
