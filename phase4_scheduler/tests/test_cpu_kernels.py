"""The CPU kernels against formulas in float64: any shape, nothing read that is not theirs, nothing written beside."""

from __future__ import annotations

import math

import pytest
import torch

from phase3_paged_attention.cached_attention import masked_attention
from phase4_scheduler.kernels import cpu
from phase4_scheduler.kernels.library import why_not_cpu_kernels

needs_kernels = pytest.mark.skipif(why_not_cpu_kernels() is not None, reason=str(why_not_cpu_kernels()))
needs_product = pytest.mark.skipif(cpu.why_not_product() is not None, reason=str(cpu.why_not_product()))
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8}


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def panels(weight):
    made = torch.empty(cpu.in_panels(*weight.shape), dtype=torch.bfloat16)
    cpu.fill_panels(made, weight)
    return made


def assert_close(found, exact, slack):
    """Within one rounding of the exact number, and the error of float32 sums of parts as large as `slack`."""
    error = (found.double() - exact).abs()
    allowed = ROUNDING[found.dtype] * exact.abs() + 4e-6 * slack
    assert (error <= allowed).all(), f"{(error - allowed).max().item():.3g} too far off"


@needs_product
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 11, 12, 13, 24, 25, 100])
@pytest.mark.parametrize(("out", "inner"), [(32, 2), (64, 130), (160, 64), (416, 2048)])
def test_products(rows, out, inner):
    x, weight = numbers(rows, inner, dtype=torch.bfloat16), numbers(out, inner, dtype=torch.bfloat16, seed=1)
    bias = numbers(out, dtype=torch.bfloat16, seed=2)
    exact, slack = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert_close(cpu.product(x, panels(weight)), exact, slack)
    assert_close(cpu.product(x, panels(weight), bias), exact + bias.double(), slack)


@needs_product
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it():
    x, weight = numbers(40, 256, dtype=torch.bfloat16), panels(numbers(96, 256, dtype=torch.bfloat16, seed=1))
    whole = cpu.product(x, weight)
    for rows in (1, 5, 12, 13, 33):
        assert torch.equal(cpu.product(x[:rows], weight), whole[:rows])
    assert torch.equal(cpu.product(x[:, ::1][7:9].clone(), weight), whole[7:9])


@needs_product
def test_products_of_inputs_that_lie_apart():
    x = numbers(6, 512, dtype=torch.bfloat16)[:, 100:228]
    weight = numbers(32, 128, dtype=torch.bfloat16, seed=1)
    assert_close(cpu.product(x, panels(weight)), x.double() @ weight.double().T, 128.0)


@needs_product
def test_panels_hold_each_number_once():
    weight = torch.arange(64 * 6).view(64, 6).to(torch.bfloat16)
    packed = panels(weight)
    assert packed.shape == (2, 3, 32, 2)
    assert torch.equal(packed.permute(0, 2, 1, 3).reshape(64, 6), weight)
    assert torch.equal(panels(weight.float().T.contiguous().T), packed), "another dtype and layout"
    assert cpu.in_panels(48, 6) is cpu.in_panels(64, 5) is None


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 100), (40, 2048), (2, 3, 64)], ids=str)
def test_norms(shape, dtype):
    x, weight, eps = numbers(*shape, dtype=dtype) * 3, numbers(shape[-1], dtype=dtype, seed=1), 1e-5
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    largest = exact.abs().max() if len(x) else 0.0
    assert_close(cpu.rms_norm(x, weight, eps), exact, largest)
    if len(shape) == 2:  # rows of a wider activation
        apart = torch.full((shape[0], 2 * shape[1]), math.nan, dtype=dtype)
        apart[:, : shape[1]] = x
        assert_close(cpu.rms_norm(apart[:, : shape[1]], weight, eps), exact, largest)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", cpu.GATES)
@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (5, 1024), (33, 3000)], ids=str)
def test_gates(shape, activation, dtype):
    x = numbers(shape[0], 2 * shape[1], dtype=dtype) * 4
    gate, up = x.double().chunk(2, -1)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    exact = functions[activation](gate) * up
    assert_close(cpu.gated(x, activation), exact, (gate * up).abs())


@needs_kernels
@pytest.mark.parametrize("activation", cpu.GATES)
def test_gates_of_numbers_that_are_far_out(activation):
    gate = torch.tensor([[-1e30, -1e4, -90.0, 0.0, 90.0, 1e4, math.nan]])
    found = cpu.gated(torch.cat((gate, torch.ones_like(gate)), -1), activation)[0]
    assert found[:4].abs().max() < 1e-30
    assert found[4:6].tolist() == [90.0, 1e4]
    assert found[6].isnan()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "turned"), [(1, 64), (3, 32), (70, 64)])
def test_turns_and_writes(tokens, turned, dtype):
    heads, shared, dim, page = 6, 2, 64, 3
    qkv = numbers(tokens, heads + 2 * shared, dim, dtype=dtype)
    before = qkv.clone()
    q, k, v = qkv.split((heads, shared, shared), 1)
    angles = numbers(tokens, turned // 2, seed=1)
    both = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    cos, sin = both.unsqueeze(1).chunk(2, -1)  # rows lie apart
    places = torch.randperm(page * (tokens + 5), generator=torch.Generator().manual_seed(3))[:tokens]
    kv = tuple(torch.full((tokens + 5, page, shared, dim), math.nan, dtype=dtype) for _ in "kv")
    cpu.turn_and_write(q, k, v, (cos, sin), (places // page, places % page), kv)

    wide = before[:, : heads + shared].double()
    first, second = wide[..., : turned // 2], wide[..., turned // 2 : turned]
    c, s = cos.double(), sin.double()
    exact = torch.cat((first * c - second * s, second * c + first * s, wide[..., turned:]), -1)
    assert_close(qkv[:, : heads + shared], exact, 4.0)
    assert torch.equal(v, before[:, heads + shared :])
    flat = [side.flatten(0, 1) for side in kv]
    assert torch.equal(flat[0][places], k)
    assert torch.equal(flat[1][places], v)
    others = torch.ones(len(flat[0]), dtype=torch.bool)
    others[places] = False
    assert all(side[others].isnan().all() for side in flat), "it wrote beside the slots"


@needs_kernels
def test_layouts_that_a_turn_can_not_take():
    qkv = numbers(2, 6, 8)
    q, k, v = qkv.split((2, 2, 2), 1)
    kv = (numbers(3, 2, 2, 8), numbers(3, 2, 2, 8))
    assert cpu.can_turn(q, k, v, kv)
    assert not cpu.can_turn(q, k.clone(), v, kv)
    assert not cpu.can_turn(q, k, v, (kv[0].bfloat16(), kv[1]))
    assert not cpu.can_turn(q[..., ::2], k[..., ::2], v[..., ::2], kv)
    assert not cpu.can_turn(q, k, v, (kv[0].transpose(1, 2), kv[1]))


class Sequences:
    """Sequences of (length, last tokens that ask) in pages of a cache whose other slots are NaN."""

    def __init__(self, sizes, heads, shared, dim, page, dtype, seed=0):
        need = [-(-length // page) for length, _ in sizes]
        order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        self.kv = tuple(torch.full((len(order), page, shared, dim), math.nan, dtype=dtype) for _ in "kv")
        self.tables = torch.zeros(len(sizes), max(need) + 1, dtype=torch.int64)
        self.counts = [count for _, count in sizes]
        self.starts = torch.tensor([0, *self.counts]).cumsum(0)
        self.lengths, self.known = torch.tensor([length for length, _ in sizes]), []
        for i, ((length, _), pages) in enumerate(zip(sizes, need, strict=True)):
            table = [order.pop() for _ in range(pages)]
            self.tables[i, :pages] = torch.tensor(table)
            self.known.append([numbers(length, shared, dim, dtype=dtype, seed=10 * i + side) for side in (1, 2)])
            for side, values in zip(self.kv, self.known[-1], strict=True):
                for t in range(length):
                    side[table[t // page], t % page] = values[t]
        wide = numbers(sum(self.counts), heads + 2, dim, dtype=dtype, seed=seed + 5) * 2
        self.q = wide[:, :heads]  # tokens lie apart

    def attended(self, **settings):
        return cpu.attend(self.q, self.kv, self.starts, self.tables, self.lengths, 0.2, **settings)

    def rows(self, i):
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def exact(self, i, window=None, soft_cap=None):
        k, v = (side.double() for side in self.known[i])
        ends = torch.arange(len(k) - self.counts[i], len(k))[:, None]
        keys = torch.arange(len(k))[None]
        seen = (keys <= ends) & (keys > ends - (window or len(k)))
        return masked_attention(self.q[self.rows(i)].double(), k, v, 0.2, seen, soft_cap)


SIZES = [(1, 1), (32, 1), (130, 1), (2500, 1), (1, 1), (5, 5), (100, 100), (150, 37), (71, 2)]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"window": 70}, {"window": 1}, {"soft_cap": 3.0}], ids=str)
@pytest.mark.parametrize(
    ("heads", "shared", "dim", "page"),
    [(4, 4, 64, 16), (4, 2, 8, 3), (6, 2, 80, 1), (10, 2, 16, 7), (7, 1, 128, 16), (20, 1, 24, 16), (70, 1, 256, 5)],
)
def test_attention_to_pages(heads, shared, dim, page, settings, dtype):
    made = Sequences(SIZES, heads, shared, dim, page, dtype)
    found = made.attended(**settings)
    for i in range(len(SIZES)):
        slack = made.known[i][1].double().abs().max() * max(1, dim / 64)  # a score is a sum of dim parts
        assert_close(found[made.rows(i)], made.exact(i, **settings), slack)


@needs_kernels
def test_attention_of_a_sequence_does_not_depend_on_its_neighbours():
    made = Sequences(SIZES, 8, 2, 64, 16, torch.float32)
    whole = made.attended()
    for i in range(len(SIZES)):
        some = (torch.tensor([0, made.counts[i]]), made.tables[i : i + 1], made.lengths[i : i + 1])
        assert torch.equal(cpu.attend(made.q[made.rows(i)], made.kv, *some, 0.2), whole[made.rows(i)])


@needs_kernels
def test_one_thread_finds_what_several_find():
    before = torch.get_num_threads()
    made = Sequences(SIZES, 8, 2, 64, 16, torch.bfloat16)
    try:
        torch.set_num_threads(1)
        alone = made.attended()
        torch.set_num_threads(3)
        assert torch.equal(made.attended(), alone)
    finally:
        torch.set_num_threads(before)
