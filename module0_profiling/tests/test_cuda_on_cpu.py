"""The CPU emulation of CUDA: it runs real CUDA C++, and its counts are what a GPU's memory system would do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from module0_profiling.cuda_on_cpu import Emulator
from module0_profiling.gpu_tools import CompileError, MissingTool, find_host_compiler

KERNELS = """
extern "C" __global__ void strided(const float* in, float* out, int stride) {
    out[threadIdx.x] = in[threadIdx.x * stride];
}
extern "C" __global__ void banks(float* out, int stride) {
    __shared__ float tile[1024];
    for (int i = threadIdx.x; i < 1024; i += 32) tile[i] = i;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x * stride];
}
extern "C" __global__ void warp_sum(const float* in, float* out) {
    float v = in[blockIdx.x * 32 + threadIdx.x];
    for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
}
template <int n> __device__ __forceinline__ void reverse_of(float* data) {
    __shared__ float copy[n];
    copy[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = copy[n - 1 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(64) reverse(float* data) { reverse_of<64>(data); }
__device__ float4 twice(float4 v) { return make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w); }
extern "C" __global__ void vectors(const float* in, float* out, int first) {
    const float4* from = reinterpret_cast<const float4*>(in + first + threadIdx.x * 4);
    *reinterpret_cast<float4*>(out + threadIdx.x * 4) = twice(*from);
}
extern "C" __global__ void outside(const float* in, float* out, int n) { out[threadIdx.x] = in[threadIdx.x + n]; }
extern "C" __global__ void scale(float* data, float by) { data[threadIdx.x] *= by; }
extern "C" __global__ void stuck(float* data) {
    if (threadIdx.x < 16) __syncthreads(); else __syncwarp();
    data[threadIdx.x] = 1.0f;
}
extern "C" __global__ void stale(float* out) {
    __shared__ float left[32];
    out[blockIdx.x * 32 + threadIdx.x] = left[threadIdx.x];
    left[threadIdx.x] = 5.0f;
}
"""


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    try:
        find_host_compiler()
    except MissingTool as error:
        pytest.skip(str(error))
    source = tmp_path_factory.mktemp("cuda") / "kernels.cu"
    source.write_text(KERNELS)
    return Emulator(source)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_a_strided_read_takes_a_sector_for_each_8_floats_of_its_stretch(
    cpu: Emulator, stride: int, sectors: int
) -> None:
    data, out = np.arange(1024, dtype=np.float32), np.zeros(32, np.float32)
    traffic = cpu.launch("strided", (1,), (32,), (data, out, stride))
    np.testing.assert_array_equal(out, data[::stride][:32])
    assert (traffic.global_loads.requests, traffic.global_loads.transactions) == (1, sectors)
    assert (traffic.global_stores.bytes, traffic.global_stores.overhead) == (128, 1.0)


@pytest.mark.parametrize(("stride", "conflicts"), [(0, 0), (1, 0), (2, 1), (3, 0), (8, 7), (32, 31)])
def test_bank_conflicts_are_the_lanes_that_share_a_bank_and_not_a_word(
    cpu: Emulator, stride: int, conflicts: int
) -> None:
    out = np.zeros(32, np.float32)
    traffic = cpu.launch("banks", (1,), (32,), (out, stride))
    np.testing.assert_array_equal(out, np.arange(32) * stride % 1024)
    assert traffic.bank_conflicts == conflicts


def test_shuffles_add_a_warp_without_shared_memory(cpu: Emulator) -> None:
    data, out = np.arange(96, dtype=np.float32), np.zeros(3, np.float32)
    traffic = cpu.launch("warp_sum", (3,), (32,), (data, out))
    np.testing.assert_array_equal(out, data.reshape(3, 32).sum(1))
    assert traffic.shared_loads.accesses == 0


def test_threads_wait_for_each_other_at_a_barrier(cpu: Emulator) -> None:
    data = np.arange(64, dtype=np.float32)
    traffic = cpu.launch("reverse", (1,), (64,), (data,))
    np.testing.assert_array_equal(data, np.arange(64)[::-1])
    assert (traffic.shared_loads.requests, traffic.shared_stores.requests) == (2, 2)


def test_a_vector_is_one_access_of_16_bytes(cpu: Emulator) -> None:
    data, out = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    traffic = cpu.launch("vectors", (1,), (32,), (data, out, 0))
    np.testing.assert_array_equal(out, 2 * data)
    assert (traffic.global_loads.accesses, traffic.global_loads.requests, traffic.global_loads.transactions) == (
        32,
        1,
        16,
    )
    assert (traffic.global_stores.accesses, traffic.global_stores.requests) == (32, 1)
    assert traffic.misaligned == 0


def test_a_vector_that_is_not_aligned_is_counted(cpu: Emulator) -> None:
    data, out = np.zeros(136, np.float32), np.zeros(128, np.float32)
    assert cpu.launch("vectors", (1,), (32,), (data, out, 2)).misaligned == 32


def test_reads_outside_of_an_array_are_counted(cpu: Emulator) -> None:
    data, out = np.zeros(32, np.float32), np.zeros(32, np.float32)
    assert cpu.launch("outside", (1,), (32,), (data, out, 0)).out_of_bounds == 0
    assert cpu.launch("outside", (1,), (32,), (data, out, 3)).out_of_bounds == 3
    assert np.isnan(out[-3:]).all()


def test_a_block_cannot_rely_on_what_the_last_one_left_in_shared_memory(cpu: Emulator) -> None:
    out = np.zeros(64, np.float32)
    cpu.launch("stale", (2,), (32,), (out,))
    assert np.isnan(out[32:]).all()


def test_floats_and_ints_reach_the_kernel(cpu: Emulator) -> None:
    data = np.ones(32, np.float32)
    cpu.launch("scale", (1,), (32,), (data, 2.5))
    assert (data == 2.5).all()


def test_mistakes_are_one_line(cpu: Emulator, tmp_path: Path) -> None:
    data = np.zeros(32, np.float32)
    with pytest.raises(ValueError, match="has no kernel 'nothing': it has strided, banks"):
        cpu.launch("nothing", (1,), (32,), (data,))
    with pytest.raises(ValueError, match="scale takes 2 arguments, got 1"):
        cpu.launch("scale", (1,), (32,), (data,))
    with pytest.raises(ValueError, match="stuck: the threads of a block wait at different barriers"):
        cpu.launch("stuck", (1,), (32,), (data,))
    wrong = tmp_path / "wrong.cu"
    wrong.write_text('extern "C" __global__ void wrong(float* x) { y[0] = 1; }')
    with pytest.raises(CompileError, match=r"wrong\.cu.*error"):
        Emulator(wrong)
