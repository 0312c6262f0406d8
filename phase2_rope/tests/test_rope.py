"""The turn on a CPU: right to a rounding, in any layout, in few operations; and the write that follows it.

float32 must equal `transformers`; half precisions may not be further from float64 than `transformers` is.
`IMPL=framework` runs the same tests on the form that the course starts from.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from phase0_prototype.config import RopeConfig
from phase0_prototype.tests.interpreter import interpreted
from phase2_rope.rope_cpu_cases import Operations
from phase2_rope.rotary import Rotary

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def rope(part) -> Any:
    return part("rope")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activation(tokens: int, hq: int, hkv: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """q, k and v as views of one product's output."""
    return random(tokens, hq + 2 * hkv, dim, dtype=dtype).split((hq, hkv, hkv), dim=1)


def angles(tokens: int, rotated: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of some positions, [T, 1, R/2] each."""
    angle = 7 * random(tokens, 1, rotated // 2, seed=1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def by_complex_numbers(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """[T, H, D] float64 from the definition: the pair as a number, times cos + i sin."""
    x, rotated = x.double(), 2 * cos.shape[-1]
    first, second = (x[..., :rotated:2], x[..., 1:rotated:2]) if interleaved else x[..., :rotated].chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    out = x.clone()
    if interleaved:
        out[..., :rotated:2], out[..., 1:rotated:2] = turned.real, turned.imag
    else:
        out[..., :rotated] = torch.cat((turned.real, turned.imag), dim=-1)
    return out


def by_transformers(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    wide = [torch.cat((side, side), -1).transpose(0, 1) for side in (cos, sin)]  # [1, T, R]
    turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *wide)
    return [x[0].transpose(0, 1) for x in turned]


def test_float32_is_that_of_transformers(rope):
    q, k, _ = activation(33, 8, 2, 64)
    cos, sin = angles(33, 64)
    wanted = by_transformers(q, k, cos, sin)
    for found, right in zip(rope.rotate(q, k, cos, sin), wanted, strict=True):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_no_further_from_float64_than_transformers_is(rope, dtype, interleaved):
    q, k, _ = activation(200, 8, 2, 64, dtype)
    cos, sin = angles(200, 64, dtype)
    as_halves = [torch.cat((x[..., ::2], x[..., 1::2]), dim=-1) if interleaved else x.clone() for x in (q, k)]
    exact = [by_complex_numbers(x, cos, sin, False) for x in as_halves]
    theirs = by_transformers(*as_halves, cos, sin)
    for x, right, other in zip(rope.rotate(q, k, cos, sin, interleaved=interleaved), exact, theirs, strict=True):
        assert x.dtype == dtype
        error = ((torch.cat((x[..., ::2], x[..., 1::2]), dim=-1) if interleaved else x) - right).abs()
        assert error.mean() <= (other - right).abs().mean()
        assert error.max() <= (other - right).abs().max()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 5),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    pairs=st.integers(1, 20),
    rest=st.integers(0, 9),
    skip=st.integers(0, 5),
    interleaved=st.booleans(),
    apart=st.booleans(),
)
def test_any_shape_and_layout(rope, tokens, heads, pairs, rest, skip, interleaved, apart):
    """Partial rotary, slices of heads (`skip` dims before), q and k of one activation or of two, odd strides."""
    whole = random(tokens, sum(heads) + 2, skip + 2 * pairs + rest)
    before = whole.clone()
    q, k = whole[:, : heads[0], skip:], whole[:, heads[0] : sum(heads), skip:]
    if apart:
        k = k.clone()
    cos, sin = angles(tokens, 2 * pairs)
    wanted = [by_complex_numbers(x, cos, sin, interleaved) for x in (q, k)]
    found = rope.rotate(q, k, cos, sin, interleaved=interleaved)
    for x, right in zip(found, wanted, strict=True):
        assert x.shape == right.shape and x.dtype == torch.float32
        torch.testing.assert_close(x.double(), right, atol=2e-6, rtol=0)
        assert torch.equal(x[..., 2 * pairs :].double(), right[..., 2 * pairs :])  # what is behind is not touched
    assert torch.equal(whole[:, sum(heads) :], before[:, sum(heads) :])  # nor are other heads
    assert torch.equal(whole[..., :skip], before[..., :skip])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(rope, interleaved):
    """What the rotation is for: q at p and k at p - 3 have one product, wherever p is."""
    table = Rotary(RopeConfig("default", 10000.0), 64, 600, torch.float64, CPU)
    q, k = (random(1, 1, 64, dtype=torch.float64, seed=seed) for seed in (0, 1))
    scores = []
    for position in (3, 50, 599):
        at_q, at_k = (table(torch.tensor([p])) for p in (position, position - 3))
        turned, _ = rope.rotate(q.clone(), q.clone(), *at_q, interleaved=interleaved)
        _, key = rope.rotate(k.clone(), k.clone(), *at_k, interleaved=interleaved)
        scores.append((turned * key).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-4, rtol=0)
    assert abs(scores[0] - (q * k).sum()) > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [16, 10])
def test_keys_and_values_are_in_the_cache_afterwards(rope, interleaved, rotated):
    q, k, v = activation(5, 4, 2, 16)
    cos, sin = angles(5, rotated)
    wanted, value = [by_complex_numbers(x, cos, sin, interleaved) for x in (q, k)], v.clone()
    kv = (torch.full((4, 3, 2, 16), 7.0), torch.full((4, 3, 2, 16), 8.0))
    at = [side.data_ptr() for side in kv]
    slots = (torch.tensor([2, 2, 0, 3, 1]), torch.tensor([0, 1, 2, 2, 0]))
    turned = rope.rotate_and_write(q, k, v, (cos, sin), slots, kv, interleaved=interleaved)
    for x, right in zip(turned, wanted, strict=True):
        torch.testing.assert_close(x.double(), right, atol=2e-6, rtol=0)
    torch.testing.assert_close(kv[0][slots].double(), wanted[1], atol=2e-6, rtol=0)
    assert torch.equal(kv[1][slots], value)
    free = torch.ones(4, 3, dtype=torch.bool)
    free[slots] = False
    assert (kv[0][free] == 7).all() and (kv[1][free] == 8).all()
    assert at == [side.data_ptr() for side in kv]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_writes_the_cache_where_it_lies(rope, interleaved, backend):
    if backend == "inductor":
        from module0_profiling.course.needs import absent

        if reason := absent("compiler"):
            pytest.skip(reason)

    def step(x, cos, sin, slots, keys, values):
        q, k, v = (2 * x).split((4, 2, 2), dim=1)
        return rope.rotate_and_write(q, k, v, (cos, sin), slots, (keys, values), interleaved=interleaved)

    x, (cos, sin) = random(3, 8, 16), angles(3, 12)
    slots = (torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0]))
    kv = [torch.zeros(3, 2, 2, 16) for _ in range(4)]
    at = [side.data_ptr() for side in kv]
    wanted = step(x, cos, sin, slots, kv[0], kv[1])
    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)(x, cos, sin, slots, kv[2], kv[3])
    for one, other in ((wanted[0], found[0]), (wanted[1], found[1]), (kv[0], kv[2]), (kv[1], kv[3])):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
    assert at == [side.data_ptr() for side in kv] and kv[2].abs().sum() > 0


@pytest.fixture(scope="module")
def in_place(rope) -> None:
    """For tests of what the turn costs. The framework's makes new tensors, which is right, and slow."""
    q, k, _ = activation(2, 2, 1, 8)
    if rope.rotate(q, k, *angles(2, 8))[0].data_ptr() != q.data_ptr():
        pytest.skip("q and k are turned into new memory here: task 2.2")


@pytest.mark.parametrize(("interleaved", "most"), [(False, 4), (True, 2)])
def test_q_and_k_of_one_activation_are_turned_in_one_go_where_they_lie(rope, in_place, interleaved, most):
    q, k, _ = activation(6, 8, 2, 32)
    cos, sin = angles(6, 32)
    with Operations() as together:
        found = rope.rotate(q, k, cos, sin, interleaved=interleaved)
    assert [x.data_ptr() for x in found] == [q.data_ptr(), k.data_ptr()]
    assert together.count <= most  # interleaved: cos + i sin is one of them
    with Operations() as apart:
        rope.rotate(q, k.clone(), cos, sin, interleaved=interleaved)
    assert apart.count > together.count


def test_tensors_that_only_look_adjacent_are_not_joined(rope, in_place):
    """k before q, k of another width, k with a gap, and k of another memory at the fitting offset."""
    whole = random(3, 8, 16)
    q, cases = whole[:, 2:5], [whole[:, :2], whole[:, 6:], whole[:, 5:7, :8], random(3, 8, 16)[:, 5:7]]
    for k in cases:
        cos, sin = angles(3, 8)
        mine = q.clone(), k.clone()
        wanted = [by_complex_numbers(x, cos, sin, False) for x in mine]
        for found, right in zip(rope.rotate(q, k, cos, sin), wanted, strict=True):
            torch.testing.assert_close(found.double(), right, atol=2e-6, rtol=0)


WITH_A_TABLE = """
import json
import torch
from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase2_rope.tests.test_rope import activation, by_complex_numbers, random
rope = parts.resolve("phase2_rope", "rope", Use.from_env("phase2", default="solution"))
angle = 7 * random(50, 12)
table, rows = torch.cat((angle.cos(), angle.sin()), dim=-1), torch.tensor([0, 3, 49, 7])
cos, sin = (side[rows].unsqueeze(1) for side in table.chunk(2, -1))
slots, found = (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 0])), {}
for interleaved in (False, True):
    q, k, v = activation(4, 4, 2, 32)
    wanted, value = [by_complex_numbers(x, cos, sin, interleaved) for x in (q, k)], v.clone()
    kv = (torch.zeros(4, 2, 2, 32), torch.zeros(4, 2, 2, 32))
    turned = rope.rotate_and_write(q, k, v, (table, rows), slots, kv, interleaved=interleaved)
    pairs = [(turned[0], wanted[0]), (kv[0][slots], wanted[1]), (kv[1][slots], value)]
    q, k, _ = activation(4, 4, 2, 32)
    pairs += zip(rope.rotate(q, k, table, rows, interleaved=interleaved), wanted)
    found[str(interleaved)] = [(x - right).abs().max().item() for x, right in pairs]
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)")
def test_a_table_and_rows_go_to_the_kernel_with_the_same_result():
    """The GPU's path, in Triton's interpreter, which must be chosen before Triton is imported."""
    found = interpreted(WITH_A_TABLE)
    assert set(found) == {"False", "True"}
    for errors in found.values():
        assert len(errors) == 5 and max(errors) < 2e-6 and errors[2] == 0  # v is copied
