"""The static report: what compilers say is read right, and a missing tool is one line."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from module0_profiling import cuda_compile, gpu_tools, kernel_commands, rooms
from module0_profiling.cuda_compile import compile_cuda, parse_resources
from module0_profiling.cuda_on_cpu.emulator import KERNEL
from module0_profiling.gpu_tools import CompileError, MissingTool, find_nvrtc, find_tool
from module0_profiling.instruction_mix import InstructionMix, from_ptx, from_sass, max_threads
from module0_profiling.occupancy import limits_of
from module0_profiling.static_report import ALL_ARCHS, report_cuda

COMPILERS = [name for name, here in (("nvrtc", find_nvrtc()), ("nvcc", shutil.which("nvcc"))) if here]
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no NVRTC and no nvcc: pip install nvidia-cuda-nvrtc")

KERNELS = """
extern "C" __global__ void __launch_bounds__(128) copy_vectors(const float* __restrict__ in, float* __restrict__ out) {
    const int i = blockIdx.x * 128 + threadIdx.x;
    reinterpret_cast<float4*>(out)[i] = reinterpret_cast<const float4*>(in)[i];
}
extern "C" __global__ void __launch_bounds__(512) reverse(const float* __restrict__ in, float* __restrict__ out) {
    __shared__ float tile[512];
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[511 - threadIdx.x] * 3.0f + in[threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* __restrict__ in, float* out, int n) {
    float v[96];
    #pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = in[i * 1024 + threadIdx.x];
    for (int r = 0; r < n; ++r) {
        #pragma unroll
        for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i + 7) % 96] + in[r];
    }
    #pragma unroll
    for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = v[i];
}
"""

SASS = """
.text.one:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0070*/               @P0 LDG.E.128.CONSTANT R4, desc[UR6][R4.64] ;
        /*0080*/              @!P1 LDG.E R8, [R6.64] ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R3], [R8.64] ;
        /*00a0*/                   LDGDEPBAR ;
        /*0130*/                   LDS.128 R0, [R0] ;
        /*0140*/                   FFMA R5, R5, R0, R1 ;
        /*0150*/                   FFMA2 R6, R6, R8, R10 ;
        /*0160*/                   STG.E.128 desc[UR6][R2.64], R4 ;
.text.two:
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0010*/                   EXIT ;
"""

PTX = """
.visible .entry one(
\t.param .u64 one_param_0
)
.maxntid 32, 4, 1
{
\tld.global.nc.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];
\t@%p1 ld.global.b32 %r1, [%rd2];
\tld.shared.f32 %f5, [%r2];
\tfma.rn.f32 %f6, %f5, %f1, %f2;
\tret;
}
"""


def test_resources_come_from_the_assembler_of_each_kernel() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas info    : Function properties for a
    64 bytes stack frame, 48 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 64 bytes cumulative stack size, 8320 bytes smem
ptxas info    : Compiling entry function 'b' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    found = parse_resources(log)
    a, b = found["a"], found["b"]
    assert (a.registers, a.spill_store_bytes, a.spill_load_bytes, a.shared_bytes) == (128, 48, 16, 8320)
    assert (b.registers, b.spill_store_bytes, b.spill_load_bytes, b.shared_bytes) == (8, 0, 0, 0)


def test_machine_code_is_counted_by_what_it_does() -> None:
    one, two = from_sass(SASS)["one"], from_sass(SASS)["two"]
    assert (one.global_loads, one.vector_loads, one.async_copies, one.vector_stores) == (2, 2, 1, 1)
    assert (one.shared_loads, one.shared_stores, one.ffma, one.total) == (1, 0, 3, 9)
    assert (two.tensor_core, two.total) == (1, 2)
    assert (two.mma, two.wgmma, two.tcgen05) == (0, 1, 0)


def test_widths_of_global_accesses_are_told_apart() -> None:
    assert from_sass(SASS)["one"].global_widths == {32: (1, 0), 128: (2, 1)}
    assert from_ptx(PTX)["one"].global_widths == {32: (1, 0), 128: (1, 0)}
    narrow = from_sass(".text.k:\n /*0000*/ LDG.E.U16.CONSTANT R4, [R4.64] ;\n /*0010*/ STG.E.64 [R2.64], R4 ;\n")
    assert narrow["k"].global_widths == {16: (1, 0), 64: (0, 1)}


def test_every_generation_of_tensor_cores_and_copies_has_its_count() -> None:
    opcodes = {
        "HMMA.16816.F32.BF16": 4,
        "IMMA.16832.S8.S8": 1,
        "QGMMA.64x128x32.F32.E4M3.E4M3": 2,
        "UTCHMMA": 3,
        "UTMALDG.2D": 5,
        "UBLKCP": 1,
        "LDGSTS.E.BYPASS.128": 6,
    }
    mix = InstructionMix("sass", opcodes)
    assert (mix.mma, mix.wgmma, mix.tcgen05, mix.tensor_core) == (5, 2, 3, 10)
    assert (mix.bulk_copies, mix.async_copies, mix.global_widths) == (6, 6, {128: (6, 0)})
    ptx = {
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16": 2,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 1,
        "tcgen05.mma.cta_group::1.kind::f16": 1,
        "cp.async.cg.shared.global": 3,
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier": 2,
        "cp.async.bulk.commit_group": 1,
    }
    mix = InstructionMix("ptx", ptx)
    assert (mix.mma, mix.wgmma, mix.tcgen05) == (1, 2, 1)
    assert (mix.bulk_copies, mix.async_copies, mix.global_widths) == (2, 3, {128: (3, 0)})


def cuda_kernels() -> list[tuple[str, Path]]:
    """(kernel, file) of every CUDA kernel of every room; the frameworks are the students' and follow the solution."""
    found = []
    for room in rooms.discover():
        for source in sorted((rooms.ROOT / room).rglob("*.cu")):
            if not {"framework", "tests"} & set(source.parts):
                found += [(kernel, source) for kernel in KERNEL.findall(source.read_text())]
    return found


def triton_kernels() -> list[tuple[str, Path]]:
    """(function, file) of every @triton.jit function of every room that is launched, not called by another one."""
    found = []
    for room in rooms.discover():
        for source in sorted((rooms.ROOT / room).rglob("*.py")):
            if {"framework", "tests"} & set(source.parts) or "triton" not in source.read_text():
                continue
            functions = [n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.FunctionDef)]
            jitted = [f for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)]
            called = {
                n.func.id
                for f in jitted
                for n in ast.walk(f)
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            }
            found += [(f.name, source) for f in jitted if f.name not in called]
    return found


def reported_sources() -> dict[Path, str]:
    return {s: room for room in kernel_commands.rooms_with_kernels() for s in kernel_commands.kernel_sources(room)}


@needs_compiler
def test_no_cuda_kernel_of_a_room_is_left_out_of_the_report() -> None:
    kernels = cuda_kernels()
    assert len(kernels) >= 18
    sources = reported_sources()
    for source in {source for _, source in kernels}:
        assert source in sources, f"{source} is in no room's kernels folder: titan kernels does not see it"
        reported = {report.kernel for report in kernel_commands.report_file(sources[source], source, ("sm_90",), None)}
        assert {kernel for kernel, file in kernels if file == source} == reported


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)")
def test_no_triton_kernel_of_a_room_is_left_out_of_the_report() -> None:
    kernels = triton_kernels()
    assert len(kernels) >= 2
    sources = reported_sources()
    builds: dict[str, set[str]] = {}  # names of kernels, by room
    for source, room in sources.items():
        if source.suffix == ".py":
            module = importlib.import_module(f"{room}.kernels.{source.stem}")
            builds.setdefault(room, set()).update(build.kernel.__name__ for build in module.AOT)
    for kernel, source in kernels:
        room = source.relative_to(rooms.ROOT).parts[0]
        assert kernel in builds.get(room, ()), (
            f"{kernel} of {source} has no build in an AOT: titan kernels does not see it"
        )


def test_all_means_every_architecture_of_the_course() -> None:
    assert kernel_commands.archs_of("all") == ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    assert kernel_commands.archs_of("sm_90, sm_120") == ("sm_90", "sm_120")
    assert all(limits_of(arch) for arch in ALL_ARCHS)


def test_ptx_is_counted_where_there_is_no_disassembler() -> None:
    mix = from_ptx(PTX)["one"]
    assert (mix.source, mix.global_loads, mix.vector_loads, mix.shared_loads, mix.ffma) == ("ptx", 2, 1, 1, 1)
    assert max_threads(PTX) == {"one": 128}


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_report_shows_vectors_shared_memory_and_spills(tmp_path: Path, compiler: str) -> None:
    source = tmp_path / "three.cu"
    source.write_text(KERNELS)
    vectors, reverse, spills = report_cuda(source, ("sm_90",), compiler=compiler)
    assert [r.kernel for r in (vectors, reverse, spills)] == ["copy_vectors", "reverse", "spills"]
    assert (vectors.threads, vectors.mix.vector_loads, vectors.mix.vector_stores, vectors.spill_bytes) == (128, 1, 1, 0)
    assert (reverse.threads, reverse.shared_bytes, reverse.mix.shared_loads) == (512, 2048, 1)
    # Two blocks of 1024 threads leave 32 registers a thread: 96 values do not fit.
    assert (spills.registers, spills.occupancy.fraction) == (32, 1.0)
    assert spills.spill_store_bytes > 0 and spills.spill_load_bytes > 0


@needs_compiler
def test_every_architecture_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void tiny(float* x) { x[threadIdx.x] += 1.0f; }')
    reports = report_cuda(source, ALL_ARCHS, threads=64)
    assert [r.arch for r in reports] == list(ALL_ARCHS)
    assert all(r.threads == 64 and r.registers > 0 and r.occupancy.warps > 0 for r in reports)


@needs_compiler
def test_a_wrong_file_is_one_line_that_names_the_error(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void wrong(float* x) { y[0] = 1.0f; }')
    with pytest.raises(CompileError) as caught:
        compile_cuda(source, "sm_90")
    assert "wrong.cu" in str(caught.value) and '"y" is undefined' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_compiler_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text("")
    monkeypatch.setattr(cuda_compile, "find_nvrtc", lambda: None)
    monkeypatch.setattr(gpu_tools, "find_tool", lambda name, beside=None: None)
    with pytest.raises(MissingTool, match=r"nvcc not found: .* To get it: pip install nvidia-cuda-nvrtc"):
        compile_cuda(source, "sm_90")
    with pytest.raises(MissingTool, match="nvrtc not found"):
        compile_cuda(source, "sm_90", compiler="nvrtc")


def test_the_command_prints_a_missing_tool_without_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object) -> None:
        raise MissingTool("nvcc", "compiling CUDA C++ needs it")

    app = typer.Typer()
    app.callback()(lambda: None)
    kernel_commands.register(app)
    monkeypatch.setattr(kernel_commands, "rooms_with_kernels", lambda: ["phase0_prototype"])
    monkeypatch.setattr(kernel_commands, "kernel_sources", lambda room: [tmp_path / "tiny.cu"])
    monkeypatch.setattr(kernel_commands, "report_file", missing)
    done = CliRunner().invoke(app, ["kernels"])
    assert done.exit_code == 1
    assert done.output.startswith("phase0_prototype/kernels/tiny.cu: nvcc not found: compiling CUDA C++ needs it.")
    assert len(done.output.strip().splitlines()) == 1


def test_an_unknown_tool_is_not_found() -> None:
    assert find_tool("no-such-tool-anywhere") is None
