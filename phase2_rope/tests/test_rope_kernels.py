"""The CUDA ladder of RoPE, run on the CPU: right for every pairing, type, size and stride.

The oracle is `kernels.rope` in float64, which is itself compared with a product of complex numbers written here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from module0_profiling.course.needs import absent
from phase0_prototype.kernels import ladder
from phase2_rope.kernels import counts, rope
from phase2_rope.kernels.counts import Case, Inputs

VERSIONS = tuple(version.name for version in ladder.read(rope.SOURCE))
TURNS = tuple(name for name in VERSIONS if name not in counts.WRITES)
FRAMEWORK = Path(rope.__file__).parent.parent / "framework" / "kernels" / "rope.cu"
CASES = {
    "heads of 64": Case(5, 4, 2, 64, 64),
    "heads of 128": Case(3, 3, 1, 128, 128),
    "6 vectors, two lanes rest": Case(6, 5, 2, 96, 96),
    "partial": Case(9, 2, 2, 80, 48, padding=True),
    "no vector fits": Case(2, 5, 1, 20, 10, padding=True),
    "vectors fit, strides do not": Case(3, 2, 1, 20, 16),
    "one pair": Case(4, 1, 1, 8, 2),
    "one token": Case(1, 4, 1, 64, 32),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_compiler = pytest.mark.skipif(absent("compiler") is not None, reason=str(absent("compiler")))


def complex_rope(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [T, H, R] as R/2 complex numbers, times e^(i angle); float64."""
    half = x.shape[-1] // 2
    z = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * angles)[:, None]
    if interleaved:
        return np.stack((z.real, z.imag), axis=-1).reshape(x.shape)
    return np.concatenate((z.real, z.imag), axis=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotated"), [(16, 16), (24, 8)])
def test_the_twin_is_a_product_of_complex_numbers(dim: int, rotated: int, interleaved: bool) -> None:
    generator = np.random.default_rng(dim)
    q, k = generator.standard_normal((5, 3, dim)), generator.standard_normal((5, 2, dim))
    table_angles, positions = generator.uniform(-9, 9, (40, rotated // 2)), np.array([3, 39, 0, 3, 7])
    cos_sin = torch.from_numpy(np.concatenate((np.cos(table_angles), np.sin(table_angles)), axis=1))
    got = [torch.from_numpy(x.copy()) for x in (q, k)]
    rope.rotate(got[0], got[1], cos_sin, torch.from_numpy(positions), interleaved=interleaved)
    for x, turned in zip((q, k), got, strict=True):
        expected = x.copy()
        expected[..., :rotated] = complex_rope(x[..., :rotated], table_angles[positions], interleaved)
        np.testing.assert_allclose(turned.numpy(), expected, atol=1e-14)


@needs_compiler
@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_version_is_right_in_every_layout_and_type(name: str, case: Case) -> None:
    for dtype in DTYPES:
        for interleaved in (False, True):
            for in_place in (True, False) if name in TURNS else (True,):
                variant = replace(case, dtype=dtype, interleaved=interleaved, in_place=in_place)
                run = counts.emulate(rope.SOURCE, name, variant)
                assert counts.error(run.results) <= 1, variant
                assert (run.traffic.out_of_bounds, run.traffic.misaligned) == (0, 0), variant


@needs_compiler
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_last_steps_are_right_at_any_size(data: st.DataObject) -> None:
    dim = 2 * data.draw(st.integers(1, 70), "half of D")
    case = Case(
        tokens=data.draw(st.integers(1, 11), "T"),
        q_heads=data.draw(st.integers(1, 9), "Hq"),
        k_heads=data.draw(st.integers(1, 4), "Hkv"),
        dim=dim,
        rotated=2 * data.draw(st.integers(1, dim // 2), "half of R"),
        interleaved=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
        in_place=data.draw(st.booleans()),
        padding=data.draw(st.booleans()),
    )
    name = data.draw(st.sampled_from(("rope_tokens", "rope_fast", "kv_write")))
    run = counts.emulate(rope.SOURCE, name, case, many_tokens=data.draw(st.booleans(), "one block for all heads"))
    assert counts.error(run.results) <= 1
    assert (run.traffic.out_of_bounds, run.traffic.misaligned) == (0, 0)


@needs_compiler
@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_any_slice_of_a_head_may_be_handed_in(name: str, offset: int) -> None:
    # Multi-head latent attention turns the last 16 dims of each head of q, and one key that all heads share.
    torch.manual_seed(offset)
    q, k = torch.randn(3, 4, 24 + offset), torch.randn(3, 40 + offset)
    table, positions = counts.cos_sin_table(20, 16), torch.tensor([19, 0, 5])
    before_q, before_k = q.clone(), k.clone()
    sides = [(x[..., -16:], y[:, None, -16:]) for x, y in ((q, k), (q.double(), k.double()))]
    rope.rotate(*sides[1], table.double(), positions, interleaved=True)
    call = rope.call(*sides[0], table, positions, interleaved=True)
    rope.prepare(name, call)()
    assert rope.vectors_fit(sides[0], table) == (offset % 4 == 0)
    for (got, exact), whole, before in zip(zip(*sides, strict=True), (q, k), (before_q, before_k), strict=True):
        torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=0)
        assert torch.equal(whole[..., :-16], before[..., :-16])  # what lies before the slice


@needs_compiler
@pytest.mark.parametrize("name", ["rope_fast", "kv_write"])
def test_the_write_leaves_k_v_and_every_other_place_alone(name: str) -> None:
    inputs = Inputs.of(Case(5, 4, 2, 64, 64, padding=True))
    _, k, v = (x.clone() for x in inputs.qkv)
    inputs.keys.fill_(7), inputs.values.fill_(7)
    rope.prepare(name, counts.prepared(name, inputs)[0])()
    assert torch.equal(inputs.qkv[1], k) and torch.equal(inputs.qkv[2], v)
    written = torch.zeros(inputs.keys.shape[:2], dtype=torch.bool)
    written[inputs.slots[0][:-1], inputs.slots[1][:-1]] = True  # the last token is padding
    assert (inputs.keys[~written] == 7).all() and (inputs.values[~written] == 7).all()
    assert torch.equal(inputs.values[inputs.slots[0][:-1], inputs.slots[1][:-1]], v[:-1])


@needs_compiler
def test_a_batch_without_tokens_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []
    monkeypatch.setattr(rope.emulated, "prepare", lambda *call: launched.append(call))
    empty = torch.empty(0, 2, 8)
    positions = torch.empty(0, dtype=torch.int64)
    rope.prepare("rope_tokens", rope.call(empty, empty, counts.cos_sin_table(4, 8), positions))()
    assert launched == []


@needs_compiler
@pytest.mark.parametrize("name", TURNS)
def test_far_positions_turn_by_the_angle_that_float32_allows(name: str) -> None:
    # A position of up to 131072 times a frequency is rounded twice to 24 bits: that is the whole error of the angle.
    last, rotated = 131072, 64
    table = counts.cos_sin_table(last, rotated)
    exact_angles = np.outer([last - 1, last // 2 + 1, 12345], 10000.0 ** (-np.arange(0, rotated, 2) / rotated))
    positions = torch.tensor([last - 1, last // 2 + 1, 12345])
    bound = last * 2.0**-24 * 2
    exact_table = np.concatenate((np.cos(exact_angles), np.sin(exact_angles)), axis=1)
    assert np.abs(table[positions].numpy() - exact_table).max() <= bound
    x = torch.randn(3, 2, rotated)
    expected = complex_rope(x.double().numpy(), exact_angles, False)
    q, k = x[:, :1].clone(), x[:, 1:].clone()
    rope.prepare(name, rope.call(q, k, table, positions))()
    got = torch.cat((q, k), dim=1).double().numpy()
    size = np.hypot(expected[..., : rotated // 2], expected[..., rotated // 2 :])  # of the pair that turns
    assert (np.abs(got - expected) <= bound * np.tile(size, 2) + 1e-6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotated": 66}, "cos_sin has 66 columns: an even number up to 64 is possible"),
        ({"rotated": 7}, "cos_sin has 7 columns"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(change: dict[str, int], message: str) -> None:
    table = torch.zeros(4, change["rotated"])
    with pytest.raises(ValueError, match=message):
        rope.call(torch.zeros(2, 1, 64), torch.zeros(2, 1, 64), table, torch.zeros(2, dtype=torch.int64))


def test_other_mistakes_are_refused_too() -> None:
    q, table, positions = torch.zeros(2, 1, 8), torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="both alike"):
        rope.call(q, q.half(), table, positions)
    with pytest.raises(ValueError, match="positions int64"):
        rope.call(q, q, table, positions.int())
    with pytest.raises(ValueError, match="must be neighbours"):
        rope.call(torch.zeros(2, 1, 16)[..., ::2], q, table, positions)
    with pytest.raises(ValueError, match="must lie alike"):
        keys = torch.zeros(2, 4, 1, 8)
        slots = (positions, positions)
        rope.call_and_write(q, q, q, table, positions, slots, keys, torch.zeros(2, 1, 4, 8).transpose(1, 2))


@needs_compiler
@pytest.mark.parametrize("name", ["rope_naive", "rope_tokens", "rope_fast", "kv_write"])
def test_the_framework_is_right_everywhere(name: str) -> None:
    assert counts.worst_error(FRAMEWORK, name) <= 1
