"""The formats of an 8-bit cache, and the files that its scales come from."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.errors import UserError
from phase3_paged_attention.kv_format import FORMATS, dequantise, format_of
from phase3_paged_attention.kv_scales import FILE, KVScales, read_scales, write_scales

KINDS = list({f.name: f for f in FORMATS.values()}.values())
ONE = torch.ones(1)


def numbers_of(kind):
    """Every finite number of a format with its code, from the definition of its bits."""
    mantissa, bias = (3, 7) if kind.dtype == torch.float8_e4m3fn else (2, 15)
    found = {}
    for code in range(128):
        exponent, fraction = code >> mantissa, code % (1 << mantissa) / (1 << mantissa)
        is_number = code != 127 if mantissa == 3 else exponent < 31
        if is_number:
            size = math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias)
            found[size], found[-size] = code, code | 128
    found[0.0] = 0
    return found


def nearest(value, numbers):
    """The number that `value` is rounded to: of two that are as near, the one whose code is even."""
    return min(numbers, key=lambda number: (abs(number - value), numbers[number] & 1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    value=st.floats(-1e6, 1e6, width=32) | st.floats(-0.0625, 0.0625, width=32), scale=st.sampled_from([1.0, 0.25, 8.0])
)
def test_numbers_become_the_nearest_one_and_the_end_beyond_the_ends(kind, value, scale):
    numbers = numbers_of(kind)
    assert max(numbers) == kind.largest
    stored = kind.quantise(torch.tensor([[value]]), torch.tensor([scale]))
    assert stored.float().item() == nearest(value / scale, numbers)
    assert dequantise(stored, torch.tensor([scale]), torch.float32).item() == stored.float().item() * scale


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_infinities_become_the_ends_and_nan_stays_nan(kind):
    stored = kind.quantise(torch.tensor([[math.inf, -math.inf, math.nan, 1e30]]), ONE).float()[0]
    assert stored[[0, 1, 3]].tolist() == [kind.largest, -kind.largest, kind.largest] and stored[2].isnan()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_scale_of_its_own_brings_the_largest_of_a_head_to_the_end(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1e-3, 1.0, 700.0]).view(3, 1, 1)
    x = (torch.randn(3, 2, 16, generator=generator) * size).to(dtype)
    x[1, 1] = 0
    scales = kind.scales_of(x)
    assert scales.shape == (3, 2) and scales.dtype == torch.float32
    back = dequantise(kind.quantise(x, scales), scales, torch.float32)
    assert torch.equal(back[1, 1], torch.zeros(16))
    largest = x.float().abs().amax(-1, keepdim=True)
    step = 2.0 ** (-4 if kind.dtype == torch.float8_e4m3fn else -3)  # half of the last bit of a mantissa
    unit = largest / kind.largest * 2.0 ** (-10 if kind.dtype == torch.float8_e4m3fn else -17)  # of a subnormal
    assert ((back - x.float()).abs() <= (x.float().abs() * step).maximum(unit) * (1 + 1e-5)).all()


def test_a_layers_tensors_tell_their_format():
    for kind in KINDS:
        sides = [torch.zeros(2, 4, 3, 8, dtype=kind.dtype)] * 2
        scales = [torch.ones(2, 4, 3) if kind.per_token else ONE] * 2
        assert format_of((*sides, *scales)) == kind
    assert FORMATS["fp8"] is FORMATS["fp8_e4m3"]


# The file of scales


SCALES = KVScales("fp8_e4m3", 100, (0.5, 0.25), (2.0, 1e-3))


def test_scales_come_back_and_serve_the_other_format(tmp_path):
    write_scales(tmp_path / FILE, SCALES)
    found = read_scales(tmp_path / FILE, 2)
    assert found == SCALES
    assert found.of("k", 1, FORMATS["fp8"]) == 0.25
    assert found.of("v", 0, FORMATS["fp8_e5m2"]) == 2.0 * 448 / 57344  # the same largest value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k_scale": [0.5]}, "k_scale has 1 numbers, the model has 2 layers"),
        ({"v_scale": None}, "v_scale has None, the model has 2 layers"),
        ({"v_scale": [1.0, 0.0]}, r"v_scale\[1\] is 0.0: a scale .* above 0"),
        ({"k_scale": [1.0, "x"]}, r"k_scale\[1\] is 'x'"),
        ({"k_scale": [math.nan, 1.0]}, r"k_scale\[0\] is nan"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype is 'int8': expected one of fp8"),
        ({"tokens": "many"}, "tokens is 'many'"),
    ],
    ids=str,
)
def test_a_wrong_file_of_scales_is_refused_in_one_line(tmp_path, changes, named):
    write_scales(tmp_path / FILE, SCALES)
    raw = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**raw, **changes}))
    with pytest.raises(UserError, match=named) as caught:
        read_scales(tmp_path / FILE, 2)
    assert FILE in str(caught.value) and "\n" not in str(caught.value)
