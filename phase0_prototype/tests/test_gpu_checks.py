"""The checks that a GPU must pass, on the CPU: they see one wrong element, and one token that is not the best."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.course.needs import absent
from phase0_prototype import gpu_checks
from phase0_prototype.kernels import coalescing, harness, ladder, matmul
from phase0_prototype.kernels.operation import Tensors

needs_compiler = pytest.mark.skipif(absent("compiler") is not None, reason=str(absent("compiler")))


@needs_compiler
@pytest.mark.parametrize("broken", ["transpose_fast", "matmul_fast", "triton"])
def test_a_wrong_kernel_fails_its_check_by_name(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def error_of(operation: Any, version: str, tensors: Tensors, device: str) -> float:
        return float("nan") if version == broken else 0.0

    monkeypatch.setattr(harness, "error_of", error_of)
    with pytest.raises(CheckFailed, match=f"{broken} is off by inf at "):
        gpu_checks.kernels("cpu", dry=True)


@needs_compiler
def test_the_error_sees_an_element_that_no_thread_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = (torch.randn(33, 70),)
    assert harness.error_of(coalescing.OPERATION, "transpose_fast", tensors, "cpu") == 0
    monkeypatch.setattr(harness, "preparer", lambda device: lambda source, version, call: lambda: None)
    assert math.isnan(harness.error_of(coalescing.OPERATION, "transpose_fast", tensors, "cpu"))


@needs_compiler
def test_every_version_of_the_products_is_within_the_bound() -> None:
    tensors = gpu_checks._inputs((33, 40, 19), "cpu")
    for version in ladder.read(matmul.SOURCE):
        assert harness.error_of(matmul.OPERATION, version.name, tensors, "cpu") <= gpu_checks.ALLOWED_SUM


def test_every_shape_of_the_check_has_a_ragged_edge_or_a_multiple_of_every_tile() -> None:
    assert any(all(n % 128 == 0 for n in shape) for shape in gpu_checks.PRODUCTS)
    assert any(all(n % 4 for n in shape[:2]) for shape in gpu_checks.TRANSPOSES)
    assert any(shape[2] % 4 for shape in gpu_checks.PRODUCTS)


def test_a_token_below_the_best_logit_is_seen() -> None:
    class Oracle:
        """Logits that always prefer the token after the last one, by 2."""

        device = torch.device("cpu")

        def __call__(self, ids: torch.Tensor) -> Any:
            logits = torch.zeros(*ids.shape, 16)
            logits.scatter_(2, (ids[..., None] + 1) % 16, 2.0)
            return type("Output", (), {"logits": logits})

    assert gpu_checks._shortfall(Oracle(), [3, 4], [5, 6, 7]) == 0
    assert gpu_checks._shortfall(Oracle(), [3, 4], [5, 9, 10]) == 2
