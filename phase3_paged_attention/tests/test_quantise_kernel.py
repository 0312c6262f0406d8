"""Turn, quantise, write: the torch twin against float64, the kernel against the twin, and what it compiles to.

The interpreter must be chosen before Triton is imported and is wrong for bfloat16: so float32 and float16 run in one
process of their own, and bfloat16 is compiled.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from phase0_prototype.tests.interpreter import interpreted
from phase2_rope.kernels import rope as exact_rope
from phase2_rope.kernels.counts import Case, Inputs
from phase3_paged_attention.kv_format import FORMATS, dequantise

NAMES = ("fp8_e4m3", "fp8_e5m2", "fp8_per_token_head")
HALF_STEP = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
TENSOR_SCALES = (0.01, 0.007)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)

INTERPRETED = """
import json
import torch
torch.set_num_threads(1)
from phase2_rope.kernels.counts import Case, Inputs
from phase3_paged_attention.kernels import quantise, quantise_triton
from phase3_paged_attention.kv_format import FORMATS, dequantise

def cache(case, kind, blocks, page):
    sides = [torch.full((blocks, page, case.k_heads, case.dim), 7.0).to(kind.dtype) for _ in "kv"]
    own = lambda: torch.full((blocks, page, case.k_heads), 7.0)
    return (*sides, *(own() if kind.per_token else torch.tensor([scale]) for scale in (0.01, 0.007)))

def unequal(a, b):
    return float((a.view(torch.uint8) != b.view(torch.uint8)).float().mean())

def steps(a, b, kind):
    '''Largest distance of FP8 tensors in steps of the format.'''
    a, b, info = a.float(), b.float(), torch.finfo(kind.dtype)
    return float(((a - b).abs() / (b.abs() * info.eps).clamp_min(info.tiny * info.eps)).max())

found = {}
sizes = ((5, 4, 2, 32, 32), (3, 3, 1, 20, 10), (4, 2, 2, 40, 24))  # plain; odd sizes; not all dims turn
kinds = ("fp8_e4m3", "fp8_e5m2", "fp8_per_token_head")
cases = [(sizes[0], i, torch.float32, k, False) for i in (False, True) for k in kinds]
cases += [(s, i, torch.float32, kinds[2], False) for s in sizes[1:] for i in (False, True)]
cases += [(sizes[0], False, torch.float32, k, True) for k in kinds]
cases += [(sizes[2], False, torch.float16, k, False) for k in kinds]
for size, interleaved, dtype, name, converts in cases:
    kind, case = FORMATS[name], Case(*size, interleaved=interleaved, dtype=dtype, padding=True)
    mine, twin = Inputs.of(case), Inputs.of(case)
    got, want = (cache(case, kind, *mine.keys.shape[:2]) for _ in "ab")
    q, k, v = mine.qkv
    before = k.clone()
    where = (mine.cos_sin, mine.positions, mine.slots)
    quantise_triton.rotate_quantise_write(q, k, v, *where, got, interleaved=interleaved, converts=converts)
    assert torch.equal(k, before)
    cos, sin = (part.unsqueeze(1) for part in twin.cos_sin[twin.positions].chunk(2, dim=-1))
    turned, key, value = (x.float() for x in twin.qkv)  # the kernel computes in float32, whatever it reads
    real = twin.slots[0] >= 0
    quantise.rotate_quantise_write(turned[real], key[real], value[real], cos[real], sin[real],
                                   tuple(slot[real] for slot in twin.slots), want, interleaved=interleaved)
    all_q = quantise.rotate(twin.qkv[0].float(), twin.qkv[1].float(), cos, sin, interleaved=interleaved)[0]
    found[f"{size} {interleaved} {dtype} {name} {converts}"] = {
        "q": float((q - all_q).abs().max()),
        "steps": max(steps(a, b, kind) for a, b in zip(got[:2], want[:2])),
        "unequal": max(unequal(a, b) for a, b in zip(got[:2], want[:2])),
        "scales": max(float(((a - b).abs() / b).max()) for a, b in zip(got[2:], want[2:])),
    }
# rounding: every number of both formats, what lies half-way between two, its neighbours, and beyond the ends
for name in kinds[:2]:
    kind = FORMATS[name]
    numbers = torch.arange(128, dtype=torch.uint8).view(kind.dtype).float()
    numbers = numbers[numbers.isfinite()]
    ties = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, *(torch.nextafter(ties, torch.tensor(x)) for x in (0.0, 1e9)), ties,
                        torch.tensor([kind.largest * 1.04, 1e30, float("inf"), float("nan"), 1e-40])])
    values = torch.cat([values, -values])
    v = torch.nn.functional.pad(values, (0, -values.numel() % 64)).view(-1, 2, 32)
    case = Case(v.shape[0], 1, 2, 32, 32)
    kv = (*(torch.zeros(9, 4, 2, 32, dtype=kind.dtype) for _ in "kv"), torch.ones(1), torch.ones(1))
    slots = torch.arange(v.shape[0])
    positions, table = torch.zeros(v.shape[0], dtype=torch.int64), torch.ones(1, 32)
    quantise_triton.rotate_quantise_write(torch.zeros(v.shape[0], 1, 32), torch.zeros_like(v), v, table, positions,
                                          (slots // 4, slots % 4), kv, converts=False)
    got = kv[1].flatten(0, 1)[: v.shape[0]]
    want = kind.quantise(v, torch.ones(1))
    same = (got.view(torch.uint8) == want.view(torch.uint8)) | (got.float().isnan() & want.float().isnan())
    found[name + " rounding"] = {"wrong": int((~same).sum()), "values": values.numel()}
# the engine, as on a GPU: layers get the table and each token's row
import sys
from phase0_prototype.sampling_params import SamplingParams
from phase2_rope.rotary import Rotary
from phase3_paged_attention.llm import LLM
gathered, use = Rotary.forward, "phase0=solution,phase1=solution,phase2=solution,phase3=solution"
prompts, params = [list(range(5, 25)), [7]], SamplingParams(temperature=0, max_tokens=4)
for name in ("fp8", "fp8_per_token_head"):
    said = []
    for forward in (gathered, lambda self, places: (self.cos_sin, places)):
        Rotary.forward = forward
        llm = LLM(sys.argv[1], dtype="float32", device="cpu", runner="eager", kv_cache_dtype=name, use=use,
                  attention_backend="torch", max_num_batched_tokens=16)
        said.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, progress=False)])
    found["engine " + name] = said
print(json.dumps(found))
"""


def cache(kind, inputs):
    """A layer's tensors, with scales that cut some values off."""
    shape = inputs.keys.shape
    scales = [torch.zeros(shape[:3]) if kind.per_token else torch.tensor([scale]) for scale in TENSOR_SCALES]
    return (*(torch.zeros(shape, dtype=kind.dtype) for _ in "kv"), *scales)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_back_is_the_turned_key_and_the_value_within_a_step(part, name, interleaved, dtype):
    kind, case = FORMATS[name], Case(7, 4, 2, 24, 16, interleaved=interleaved, dtype=dtype)
    inputs, wide = Inputs.of(case), Inputs.of(case).double()
    exact = wide.qkv
    exact_rope.rotate_and_write(
        *exact, wide.cos_sin, wide.positions, wide.slots, wide.keys, wide.values, interleaved=interleaved
    )
    kv, (q, k, v) = cache(kind, inputs), inputs.qkv
    cos, sin = (half.unsqueeze(1).to(dtype) for half in inputs.cos_sin[inputs.positions].chunk(2, dim=-1))
    quantise = part("kernels.quantise").rotate_quantise_write
    turned = quantise(q, k, v, cos, sin, inputs.slots, kv, interleaved=interleaved)
    off = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(turned.double(), exact[0], rtol=off, atol=4 * off)
    for stored, scale, expected in zip(kv[:2], kv[2:], (wide.keys, wide.values), strict=True):
        back = dequantise(stored, scale, torch.float32).double()
        cut = expected if kind.per_token else expected.clamp(-kind.largest * scale.item(), kind.largest * scale.item())
        largest = expected.abs().amax(-1, keepdim=True)
        allowed = HALF_STEP[kind.dtype] * cut.abs() + (off + 2.0**-16) * largest
        assert ((back - cut).abs() <= allowed).all()
        untouched = torch.ones(stored.shape[:2], dtype=torch.bool)
        untouched[inputs.slots] = False
        assert not stored.float()[untouched].any()
        if kind.per_token:
            assert not scale[untouched].any() and (scale[~untouched] > 0).all()
    if not kind.per_token:
        assert [scale.item() for scale in kv[2:]] == pytest.approx(TENSOR_SCALES)


@pytest.fixture(scope="module")
def found(checkpoint) -> dict:
    return interpreted(INTERPRETED, str(checkpoint("llama-gqa").path))


@needs_triton
def test_in_float32_the_kernel_writes_the_bytes_of_its_twin(found):
    plain = {name: f for name, f in found.items() if "float32" in name and name.endswith("False")}
    assert len(plain) == 2 * 3 + 2 * 2
    for name, f in plain.items():
        assert f["q"] < 1e-6 and f["scales"] < 1e-6 and f["steps"] <= 1 and f["unequal"] < 0.005, name


@needs_triton
def test_in_float16_it_is_within_a_step(found):
    others = [f for name, f in found.items() if "float16" in name]
    assert len(others) == 3
    for f in others:
        assert f["q"] < 2e-3 and f["scales"] < 1e-6 and f["steps"] <= 1 and f["unequal"] < 0.01


@needs_triton
def test_the_gpus_conversion_is_wired_the_same(found):
    """The interpreter's cast is wrong for some numbers, so most of them must do."""
    others = [f for name, f in found.items() if name.endswith("True")]
    assert len(others) == 3
    for f in others:
        assert f["q"] < 1e-6 and f["scales"] < 1e-6 and f["unequal"] < 0.03


@needs_triton
def test_the_integers_round_as_the_cast_does(found):
    for name in NAMES[:2]:
        assert found[f"{name} rounding"]["wrong"] == 0 and found[f"{name} rounding"]["values"] > 900


@needs_triton
def test_the_engine_says_the_same_by_the_kernel(found):
    for name in ("engine fp8", "engine fp8_per_token_head"):
        by_torch, by_kernel = found[name]
        assert by_torch == by_kernel and len(by_torch) == 2 and all(len(tokens) == 4 for tokens in by_torch)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_it_compiles_for_six_gpus_with_vectors_both_ways_and_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from module0_profiling.static_report import ALL_ARCHS, report_triton
    from phase3_paged_attention.kernels import quantise_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    builds = [quantise_triton.AOT[1], quantise_triton.CONVERTING[1]]  # scales by token: the most registers
    reports = [*report_triton(builds[:1], ALL_ARCHS), *report_triton(builds[1:], ["sm_90"])]
    assert len(reports) == 6 + 1
    for report in reports:
        where = f"{report.kernel} on {report.arch}"
        assert report.spill_bytes == 0, where
        assert report.mix.vector_loads > 0 and report.mix.vector_stores > 0, where
        narrow = [width for width, (_, stores) in report.mix.global_widths.items() if stores and width < 32]
        assert not narrow, where  # 8-bit numbers leave in words
        assert report.occupancy.fraction >= 0.4, where
    portable, converted = (report.mix.total for report in reports if report.arch == "sm_90")
    assert converted < portable  # by the instruction that there is for it
