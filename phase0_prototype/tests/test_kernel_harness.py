"""The host side of the ladders: launches, checks and timing, with the CPU emulation in the GPU's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from module0_profiling import timing
from module0_profiling.cuda_on_cpu import emulator
from module0_profiling.gpu_tools import MissingTool, find_host_compiler
from phase0_prototype.kernels import coalescing, harness, ladder, launch, matmul
from phase0_prototype.kernels.operation import Operation, Tensors


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda._compile_kernel` gives kernels that run in the emulation, on CPU tensors."""
    try:
        find_host_compiler()
    except MissingTool as error:
        pytest.skip(str(error))

    def compile_kernel(source: Path, _modified: int, version: str) -> Callable[..., None]:
        def kernel(*, grid: tuple[int, ...], block: tuple[int, ...], args: list[torch.Tensor | int]) -> None:
            cpu_args = [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]
            emulator(source).launch(version, grid, block, cpu_args)

        return kernel

    monkeypatch.setattr(launch, "_compile", compile_kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def _on_cpu(operation: Operation) -> Operation:
    def inputs(size: int, device: str) -> Tensors:
        assert device == "cuda"
        return operation.inputs(size, "cpu")

    return replace(operation, inputs=inputs, triton=operation.reference)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("operation", [coalescing.OPERATION, matmul.OPERATION], ids=lambda o: o.name)
def test_check_compares_every_version_with_float64(operation: Operation) -> None:
    checked = harness.check(_on_cpu(operation), sizes=(33,))
    assert [c.version for c in checked] == [v.name for v in ladder.read(operation.source)]
    assert max(c.error for c in checked) < 1e-5


@pytest.mark.usefixtures("emulated")
def test_bench_reports_the_ratio_to_the_first_version_and_to_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleave(functions: Mapping[str, object], *, rounds: int, device: str) -> dict[str, timing.Timing]:
        assert device == "cuda"
        seconds = {"transpose_naive": 8e-3, "transpose_fast": 1e-3, coalescing.OPERATION.peer: 2e-3}
        return {name: timing.Timing((seconds.get(name, 4e-3),) * rounds) for name in functions}

    monkeypatch.setattr(timing, "interleave", interleave)
    rows = {row.version: row for row in harness.bench(_on_cpu(coalescing.OPERATION), size=64, rounds=3)}
    fast = rows["transpose_fast"]
    assert (fast.over_first, fast.over_peer) == (pytest.approx(8.0), pytest.approx(2.0))
    assert fast.gbytes_per_second == pytest.approx(2 * 64 * 64 * 4 / 1e-3 / 1e9)
    assert list(rows) == [*(v.name for v in ladder.read(coalescing.SOURCE)), "triton", coalescing.OPERATION.peer]


def test_without_a_gpu_a_launch_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="transpose_fast needs an NVIDIA GPU, and torch sees none here"):
        launch.run(coalescing.OPERATION, "transpose_fast", torch.zeros(4, 4))


def test_the_ncu_command_names_every_kernel() -> None:
    command = harness.ncu_command(matmul.OPERATION)
    assert command.startswith("ncu --kernel-name 'regex:matmul_naive|") and command.endswith("kernels.matmul")


def test_a_kernel_without_its_launch_line_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text('extern "C" __global__ void lost(float* x) {}')
    with pytest.raises(ValueError, match="1 kernels but 0 with '// adds:' and '// launch:' above"):
        ladder.read(source)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("operation", [coalescing.OPERATION, matmul.OPERATION], ids=lambda o: o.name)
def test_every_version_is_right_on_this_gpu(operation: Operation) -> None:
    assert max(c.error for c in harness.check(operation)) < 1e-5
