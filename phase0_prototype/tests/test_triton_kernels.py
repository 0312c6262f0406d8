"""The Triton twins in Triton's interpreter, against their torch twins, and compiled ahead of time for three GPUs.

float32 and float16 only: the interpreter is silently wrong for bfloat16. It must be chosen before Triton is imported,
so all cases run in one process of their own.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from phase0_prototype.tests.interpreter import interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)

INTERPRETED = """
import json, torch
from phase0_prototype.kernels import coalescing, matmul
from phase0_prototype.kernels.coalescing_triton import transpose
from phase0_prototype.kernels.matmul_triton import matmul as product
torch.manual_seed(0)
torch.set_num_threads(1)
found = {}
for dtype in (torch.float32, torch.float16):
    for shape in ((64, 32), (33, 70), (1, 5)):
        x = torch.randn(shape).to(dtype)
        found[f"transpose {dtype} {shape}"] = (transpose(x, block=32) - coalescing.reference(x)).abs().max().item()
    for m, n, k in ((64, 64, 32), (33, 70, 21), (1, 65, 16)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        got = product(a, b, block_m=32, block_n=32, block_k=16).double()
        exact = matmul.reference(a.double(), b.double())
        found[f"matmul {dtype} {m}x{n}x{k}"] = ((got - exact).abs().max() / exact.abs().max()).item()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted(INTERPRETED)


def test_transpose_is_exact_at_any_size(errors: dict[str, float]) -> None:
    found = {name: error for name, error in errors.items() if name.startswith("transpose")}
    assert len(found) == 6
    assert set(found.values()) == {0.0}


def test_matmul_agrees_with_float64_at_any_size(errors: dict[str, float]) -> None:
    found = {name: error for name, error in errors.items() if name.startswith("matmul")}
    assert len(found) == 6
    for name, error in found.items():
        assert error < (1e-3 if "float16" in name else 1e-6), name


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_both_twins_compile_for_three_gpus_with_vectors_and_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from module0_profiling.static_report import report_triton
    from phase0_prototype.kernels import coalescing_triton, matmul_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    reports = report_triton(coalescing_triton.AOT + matmul_triton.AOT[:1])
    assert [r.arch for r in reports] == ["sm_80", "sm_90", "sm_120"] * 2
    for report in reports:
        where = f"{report.kernel} on {report.arch}"
        assert report.spill_bytes == 0, where
        assert report.mix.vector_loads > 0, where
        assert report.occupancy.fraction >= 0.25, where
    for product in reports[3:]:
        assert product.mix.ffma >= 512 and product.mix.tensor_core == 0  # float32 on the CUDA cores, as in the ladder
