"""Counting bytes: the kernel's own addresses, the cost model, and what torch's operations really move, agree."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phase0_prototype.tests.interpreter import interpreted
from phase3_paged_attention.kernels import costs
from phase3_paged_attention.kernels.costs import Decode

triton_only = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)
RUNGS = ("naive", "online", "tiled", "packed", "split")

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def copy_kernel(from_ptr, to_ptr, count_ptr, stride, N: tl.constexpr, USED: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(from_ptr + i * stride, mask=i < USED, other=0.0)
    tl.store(to_ptr + tl.program_id(0) * N + i, x)
    tl.atomic_add(count_ptr, 1)
"""
TRACED = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from copy_kernels import copy_kernel
from triton.runtime.interpreter import interpreter_builder
from phase3_paged_attention.measures import ladder_cases
from phase3_paged_attention.kernels import costs, decode_ladder
from phase3_paged_attention.kernels.costs import Decode
from phase3_paged_attention.kernels.trace import Trace
found, before = {}, set(vars(interpreter_builder))
x, y, count = torch.randn(64), torch.zeros(32), torch.zeros(1, dtype=torch.int32)
with Trace({}) as around, Trace({"x": x, "count": count}) as trace:
    copy_kernel[(2,)](x, y, count, 4, N=16, USED=10)
for name, moved in {"x": trace.loads("x"), "y": trace.stores("elsewhere"), "read y": trace.loads("elsewhere"),
                    "count": trace.loads("count"), "counted": trace.stores("count")}.items():
    found[name] = [moved.instructions, moved.requested, moved.sectors, moved.unique, moved.distinct]
found["programs"], found["all"], found["around"] = trace.programs, trace.bytes(), around.bytes("elsewhere")
copy_kernel[(1,)](x, y, count, 4, N=16, USED=10)  # behind the with: not counted
found["later"] = trace.bytes()
found["restored"] = before - {"grid_idx", "grid_dim"} == set(vars(interpreter_builder)) - {"grid_idx", "grid_dim"}
try:
    with Trace({}):
        raise ZeroDivisionError
except ZeroDivisionError:
    found["restored after an error"] = "create_masked_load" not in vars(interpreter_builder)

case, found["rungs"] = Decode((37, 16, 1), 3, 1, 80), {}
q, (keys, values), lengths, tables = ladder_cases.inputs(case)
for rung in decode_ladder.RUNGS:
    with Trace({"q": q, "keys": keys, "values": values, "lengths": lengths, "tables": tables}) as trace:
        decode_ladder.run(rung, q, keys, values, lengths, tables, 0.1, block_n=16, splits=5)
    model = costs.requested(rung, case, splits=5, block_n=16)
    made = sum(model.pop(name, 0) for name in ("out", "sums", "lse"))
    found["rungs"][rung] = {name: [trace.bytes(name), size] for name, size in {**model, "elsewhere": made}.items()}
case = Decode((33, 7), 4, 1, 32)
found["figures"] = {figure.name: figure.value for figure in ladder_cases.traced(case)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process of its own has traced."""
    directory = tmp_path_factory.mktemp("kernels")
    (directory / "copy_kernels.py").write_text(KERNELS)
    return interpreted(TRACED, str(directory))


@triton_only
def test_what_a_kernel_loads_and_stores_is_counted_by_element_sector_and_program(found: dict[str, Any]) -> None:
    # 10 of 16 floats, every fourth: two in a sector, in each of two programs, which read the same
    assert found["x"][:2] == [2, 2 * 10 * 4]
    assert found["x"][2] in (
        2 * 5 * 32,
        2 * 6 * 32,
    )  # where the tensor begins within a sector is the allocator's choice
    assert found["x"][3:] == [2 * 10 * 4, 10 * 4]
    assert found["y"][:2] == [2, 2 * 16 * 4] and found["y"][3:] == [128, 128]
    assert found["read y"] == [0, 0, 0, 0, 0]
    assert found["count"] == found["counted"] == [2, 8, 64, 8, 4]  # an atomic operation reads and writes
    assert found["programs"] == 2
    assert found["all"] == found["later"] == found["around"] == 80 + 128 + 8 + 8
    assert found["restored"] and found["restored after an error"]


def test_a_trace_names_what_it_cannot_tell_apart() -> None:
    from phase3_paged_attention.kernels.trace import Trace

    qkv = torch.zeros(4, 3, 8)
    with pytest.raises(ValueError, match="overlap in memory"):
        Trace({"q": qkv[:, 0], "k": qkv[:, 1]})
    with pytest.raises(ValueError, match="q is on meta"):
        Trace({"q": torch.zeros(1, device="meta")})
    with pytest.raises(KeyError, match="'values' is not traced: there are qkv, elsewhere"):
        Trace({"qkv": qkv}).bytes("values")


@triton_only
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="here it interprets")
def test_a_compiled_kernel_cannot_be_traced() -> None:
    from phase3_paged_attention.kernels.trace import Trace

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), Trace({}):
        pass


@triton_only
def test_the_model_is_right_tensor_by_tensor_for_ragged_lengths_and_odd_heads(found: dict[str, Any]) -> None:
    assert tuple(found["rungs"]) == RUNGS
    for rung, tensors in found["rungs"].items():
        assert set(tensors) == {"q", "keys", "values", "lengths", "tables", "elsewhere"}
        assert {name: pair for name, pair in tensors.items() if pair[0] != pair[1]} == {}, rung


@triton_only
def test_by_its_own_addresses_the_ladder_ends_at_once_for_all_heads(found: dict[str, Any]) -> None:
    row, figures = "traced 33, 7 tokens", found["figures"]
    for rung in RUNGS:
        assert figures[f"{row}/{rung}"] == figures[f"{row}/{rung} by the model"], rung
        assert figures[f"{row}/{rung} distinct"] == 1, rung  # nothing is read that needn't be
    times = {"naive": 1.5 * 4, "online": 4, "tiled": 4, "packed": 1, "split": 1}
    assert {rung: figures[f"{row}/{rung} keys and values"] for rung in RUNGS} == times
    assert figures[f"{row}/packed"] <= figures[f"{row}/PyTorch unfused"] / 3


class Moved(TorchDispatchMode):
    """Bytes that each operation reads and writes: numbers of its tensors, repeats of an expanded one counted once."""

    VIEWS = ("view", "expand", "transpose", "unsqueeze", "squeeze", "slice", "_unsafe_view", "detach", "alias", "t")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            written = sum(map(_bytes, tree_leaves(out)))
            inputs = [_bytes(x) for x in tree_leaves((args, kwargs))]
            if name == "index":  # a gather reads what it writes, and its indices
                inputs = [written, *map(_bytes, tree_leaves(args[1]))]
            self.operations.append((name, sum(inputs), written))
        return out


def _bytes(x: Any) -> int:
    if not isinstance(x, Tensor):
        return 0
    numbers = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * x.element_size()


def _operations(case: Decode, attend: Callable[..., Tensor]) -> list[tuple[int, int]]:
    """Bytes (read, written) of each operation that torch plans for `attend`, without any memory."""
    half = {"dtype": torch.float16, "device": "meta"}
    q = torch.empty(case.batch, case.heads, case.dim, **half)
    keys, values = (torch.empty(40, case.page, case.kv_heads, case.dim, **half) for _ in range(2))
    tables = torch.empty(case.batch, case.gathered // case.page, dtype=torch.int64, device="meta")
    mask = torch.empty(case.batch, 1, 1, case.gathered, **half)
    with Moved() as moved:
        attend(q, keys, values, tables, mask, 0.1)
    done: list[tuple[int, int]] = []
    for (before, *_), (name, read, written) in itertools.pairwise([("", 0, 0), *moved.operations]):
        if before == "_to_copy" and name == "_softmax":  # on a GPU softmax converts what it reads (half_to_float)
            read, _ = done.pop()
        done.append((read, written))
    return done


@pytest.mark.parametrize("case", [Decode((37, 20), 8, 2, 64), Decode((16, 5, 2), 3, 3, 32)], ids=["G 4", "G 1"])
def test_torch_moves_what_the_model_of_its_operations_says(case: Decode) -> None:
    found = _operations(case, costs.unfused_attention)
    model = costs.unfused(case)
    assert sorted(found) == sorted((operation.read, operation.written) for operation in model)
    assert sum(map(sum, found)) == costs.total(model)


@pytest.mark.parametrize("attend", [costs.unfused_attention, costs.gathered_attention])
def test_what_is_counted_for_torch_is_attention(attend: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    lengths, (heads, kv_heads, dim, page) = torch.tensor([5, 20]), (6, 2, 16, 8)
    cache = torch.randn(2, 7, page, kv_heads, dim)
    tables = torch.tensor([[3, 0, 0], [6, 1, 4]])
    q = torch.randn(2, heads, dim)
    got = attend(q, *cache, tables, costs.length_mask(lengths, 24, torch.float32), 0.3)
    for b, n in enumerate(lengths.tolist()):
        k, v = cache[:, tables[b]].flatten(1, 2)[:, :n].double().repeat_interleave(heads // kv_heads, dim=2)
        weights = torch.softmax(torch.einsum("hd,shd->hs", q[b].double(), k) * 0.3, dim=1)
        torch.testing.assert_close(got[b].double(), torch.einsum("hs,shd->hd", weights, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_the_ladder_ends_at_less_than_a_third_of_what_torch_moves(group: int) -> None:
    case = Decode.even(8, 4096, 8 * group, 8, 128)
    asked = {rung: sum(costs.requested(rung, case, splits=4).values()) for rung in RUNGS}
    assert costs.minimum(case) < asked["packed"] < 1.01 * costs.minimum(case)
    assert asked["packed"] <= asked["split"] <= 1.05 * asked["packed"]
    assert asked["packed"] <= costs.total(costs.unfused(case)) / 3
    assert 2.9 < costs.total(costs.gathered_sdpa(case)) / costs.minimum(case) < 3.1
    assert asked["naive"] / asked["online"] == pytest.approx(1.5, rel=0.01)
    assert asked["online"] / asked["packed"] == pytest.approx(group, rel=0.02)


def test_flops_and_the_floor_of_time_are_those_of_the_smallest_kernel() -> None:
    case = Decode((3,), heads=4, kv_heads=1, dim=8)
    assert costs.minimum(case) == 2 * 3 * 8 * 2 + 2 * 4 * 8 * 2
    assert costs.flops(case) == 2 * (2 * 4 * 3 * 8)  # two products of [4, 8] x [8, 3] and [4, 3] x [3, 8]
    assert costs.floor_seconds(Decode.even(64, 8192, 32, 8, 128), 4.3e12) == pytest.approx(500e-6, rel=0.01)
    with pytest.raises(ValueError, match="no rung 'fused': there are naive"):
        costs.requested("fused", case)
