"""Linear layers: parts land in their rows, formats are filled once and hold the weight once, products are right."""

from __future__ import annotations

import pytest
import torch

from phase0_prototype.linear import Dense, Linear, OneDNNPacked, Part, best_format
from phase0_prototype.matvec import matvec, prepare

CPU = torch.device("cpu")
REFUSED = OneDNNPacked.why_not(CPU, torch.bfloat16)
packs = pytest.mark.skipif(bool(REFUSED), reason="; ".join(REFUSED))
PARTS = (Part("q", 48), Part("k", 16), Part("v", 16))
IN = 64


class Counting(Dense):
    """Counts what the layer asks of its format."""

    def __init__(self):
        self.calls = []

    def create(self, layer):
        self.calls.append("create")
        super().create(layer)

    def load(self, layer, start, tensor):
        self.calls.append(("load", start))
        super().load(layer, start, tensor)

    def finish(self, layer):
        self.calls.append("finish")


def filled(number_format, dtype, *, bias=False, parts=PARTS, in_features=IN, order=None):
    """A layer loaded with random tensors in `order`; returns it with the weight and bias it should have (float32)."""
    layer = Linear(parts, in_features, bias=bias, number_format=number_format, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(destination.shape, generator=generator).bfloat16()
        for name, destination in layer.destinations().items()
    }
    for name in order or tensors:
        layer.destinations()[name].load(tensors[name])
    weight = torch.cat([tensors[f"{p.name}.weight"] for p in parts]).float()
    return layer, weight, torch.cat([tensors[f"{p.name}.bias"] for p in parts]).float() if bias else None


@pytest.mark.parametrize("bias", [False, True])
def test_parts_are_stacked_in_order_whatever_the_order_of_loading(bias):
    order = [f"{name}.{kind}" for kind in ("weight", *["bias"] * bias) for name in "vqk"]
    layer, weight, expected_bias = filled(Dense(), torch.float32, bias=bias, order=order)
    assert torch.equal(layer.weight, weight)
    assert (layer.bias is None) if expected_bias is None else torch.equal(layer.bias, expected_bias)
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, expected_bias))


def test_destinations_have_the_checkpoints_names_and_shapes():
    layer = Linear(PARTS, IN, bias=True, number_format=Dense(), dtype=torch.float32, device=CPU)
    shapes = {name: d.shape for name, d in layer.destinations().items()}
    assert shapes == {
        **{"q.weight": (48, IN), "k.weight": (16, IN), "v.weight": (16, IN)},
        **{"q.bias": (48,), "k.bias": (16,), "v.bias": (16,)},
    }


@pytest.mark.parametrize("bias", [False, True])
def test_a_format_is_created_and_finished_once_after_the_last_weight(bias):
    counting = Counting()
    filled(counting, torch.float32, bias=bias)
    assert counting.calls == ["create", ("load", 0), ("load", 48), ("load", 64), "finish"]


@packs
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(80, 64), (96, 40), (33, 70), (320, 64)], ids=str)
def test_packed_bfloat16_rounds_like_one_product_in_float32(rows, bias, shape):
    parts = (Part("a", shape[0] // 2), Part("b", shape[0] - shape[0] // 2))
    layer, weight, b = filled(OneDNNPacked(), torch.bfloat16, bias=bias, parts=parts, in_features=shape[1])
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
    expected = torch.nn.functional.linear(x.float(), weight, b)
    got = layer(x)
    assert got.dtype == torch.bfloat16
    # one rounding to 8 bits of the exact sum, the bias inside
    torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=2**-8)


@packs
def test_packing_drops_the_plain_weight():
    parts = (Part("a", 16), Part("b", 16))
    layer = Linear(parts, 32, bias=False, number_format=OneDNNPacked(), dtype=torch.bfloat16, device=CPU)
    assert not hasattr(layer, "weight"), "nothing is held before the checkpoint is read"
    layer.destinations()["b.weight"].load(torch.ones(16, 32))
    plain = layer.weight
    layer.destinations()["a.weight"].load(torch.ones(16, 32))
    assert layer.weight is not plain
    held = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert len(held) == 1 and held[0].numel() * held[0].element_size() == 32 * 32 * 2
    assert not [t for t in vars(layer.format).values() if isinstance(t, torch.Tensor)]


def test_why_not_gives_reasons():
    assert OneDNNPacked.why_not(torch.device("cuda"), torch.bfloat16) == ["oneDNN packing is for CPUs, not cuda"]
    assert "bfloat16" in OneDNNPacked.why_not(CPU, torch.float32)[0]


def test_the_best_format_is_packed_only_where_it_works():
    assert type(best_format(CPU, torch.float32)) is Dense
    assert type(best_format(CPU, torch.bfloat16)) is (Dense if REFUSED else OneDNNPacked)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (33, 70), (16, 5632), (7, 4099), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_row_product_that_is_compiled_is_exact_to_its_dtype(shape, dtype, bias):
    """Traced and run operator by operator; what Inductor makes of it is tested through the engine, in test_runner."""
    prepare()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(1, shape[1], generator=generator).to(dtype)
    b = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    got = matvec(x, weight, b)
    expected = torch.nn.functional.linear(x.double(), weight.double(), b.double() if b is not None else None)
    assert got.dtype == dtype and got.shape == (1, shape[0])
    rtol = 2**-8 if dtype == torch.bfloat16 else 2**-18
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol * shape[1] ** 0.5)


def test_plain_weights_are_kept_for_a_compiled_row():
    assert type(best_format(CPU, torch.bfloat16, compiled_row=True)) is Dense
