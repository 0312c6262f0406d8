"""What the compiler makes of the CUDA ladders: registers, spills, occupancy and vectors, with no GPU."""

from __future__ import annotations

import shutil

import pytest

from module0_profiling.gpu_tools import find_nvrtc
from module0_profiling.static_report import KernelReport, report_cuda
from phase0_prototype.kernels import coalescing, counts, ladder, matmul, occupancy

pytestmark = pytest.mark.skipif(
    find_nvrtc() is None and shutil.which("nvcc") is None, reason="no NVRTC and no nvcc: pip install nvidia-cuda-nvrtc"
)


@pytest.fixture(scope="module")
def on_hopper() -> dict[str, KernelReport]:
    sources = (coalescing.SOURCE, matmul.SOURCE, occupancy.SOURCE)
    return {report.kernel: report for source in sources for report in report_cuda(source, ("sm_90",))}


def test_every_version_compiles_and_declares_its_block(on_hopper: dict[str, KernelReport]) -> None:
    for source in (coalescing.SOURCE, matmul.SOURCE, occupancy.SOURCE):
        for version in ladder.read(source):
            assert on_hopper[version.name].threads == version.block[0] * version.block[1], version.name


def test_only_the_squeezed_version_spills(on_hopper: dict[str, KernelReport]) -> None:
    assert [name for name, report in on_hopper.items() if report.spill_bytes] == ["occupancy_squeezed"]


def test_the_last_steps_use_128_bit_loads(on_hopper: dict[str, KernelReport]) -> None:
    assert on_hopper["transpose_fast"].mix.vector_loads and on_hopper["transpose_fast"].mix.vector_stores
    assert on_hopper["matmul_fast"].mix.vector_loads and on_hopper["matmul_fast"].mix.vector_stores
    assert not on_hopper["matmul_tiled"].mix.vector_loads


def test_occupancy_falls_as_the_work_of_a_thread_grows(on_hopper: dict[str, KernelReport]) -> None:
    fraction = {name: report.occupancy.fraction for name, report in on_hopper.items()}
    assert (fraction["occupancy_tile4"], fraction["occupancy_tile16"]) == (0.5, 1.0)
    assert (fraction["occupancy_fast"], fraction["occupancy_tile128"]) == (0.5, 0.25)
    assert on_hopper["occupancy_tile4"].occupancy.limiter == "block slots"
    assert on_hopper["occupancy_tile128"].occupancy.limiter == "registers"


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_the_last_step_keeps_half_of_the_warps_without_spills_elsewhere_too(arch: str) -> None:
    assert counts.theoretical_occupancy(occupancy.SOURCE, arch=arch) >= 0.5
