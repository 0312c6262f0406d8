"""Compiles CUDA C++ (a ``.cu`` file) or PTX to machine code for any GPU, without one.

NVRTC comes first: one wheel, no host compiler. nvcc is second. Both end in the same ``Binary``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from module0_profiling.gpu_tools import CompileError, MissingTool, find_nvrtc, find_tool, require_tool
from module0_profiling.nvrtc import Nvrtc, first_error


@dataclass(frozen=True)
class Resources:
    """What the assembler gave one kernel: registers a thread; spills, stack and static shared memory in bytes."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Binary:
    """One source compiled for one architecture; ``resources`` is keyed by kernel name."""

    arch: str
    compiler: str
    ptx: str
    cubin: bytes
    resources: dict[str, Resources]


def compile_cuda(source: Path, arch: str, *, compiler: str = "auto", defines: Sequence[str] = ()) -> Binary:
    """Compiles a ``.cu`` file for ``arch`` (``sm_90``) with the macros ``defines``.

    ``compiler``: ``nvrtc``, ``nvcc`` or ``auto`` (NVRTC, else nvcc). Raises ``MissingTool`` when there is none and
    ``CompileError`` when the file is wrong.
    """
    if compiler not in ("auto", "nvrtc", "nvcc"):
        raise ValueError(f"compiler is auto, nvrtc or nvcc, not {compiler!r}")
    if not source.is_file():
        raise CompileError(f"no such file: {source}")
    nvrtc = find_nvrtc() if compiler != "nvcc" else None
    if nvrtc is not None:
        built = _load_nvrtc(nvrtc).compile(source.read_text(), source.name, arch, defines)
        name = f"NVRTC {_load_nvrtc(nvrtc).version}"
        return Binary(arch, name, built.ptx, built.cubin, parse_resources(built.log))
    if compiler == "nvrtc":
        raise MissingTool("nvrtc", "compiling CUDA C++ needs it")
    return _compile_with_nvcc(source, arch, defines)


def assemble(ptx: str, arch: str, *, ptxas: Path, compiler: str) -> Binary:
    """Assembles PTX with ``ptxas``; ``compiler`` names who wrote the PTX."""
    with tempfile.TemporaryDirectory(prefix="titan-ptxas-") as folder:
        text, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(ptx)
        log = _run([str(ptxas), "-v", f"--gpu-name={arch}", str(text), "-o", str(cubin)], f"ptxas for {arch}")
        return Binary(arch, compiler, ptx, cubin.read_bytes(), parse_resources(log))


def disassemble(binary: Binary) -> str | None:
    """SASS listing of a binary, or None where there is no disassembler that can read it."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        return None
    with tempfile.NamedTemporaryFile(prefix="titan-", suffix=".cubin") as cubin:
        cubin.write(binary.cubin)
        cubin.flush()
        done = subprocess.run([str(nvdisasm), cubin.name], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def parse_resources(log: str) -> dict[str, Resources]:
    """Resources of each kernel from the output of ``ptxas -v``."""
    found: dict[str, Resources] = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        found[name] = Resources(
            registers=_number(r"Used (\d+) registers", part),
            spill_store_bytes=_number(r"(\d+) bytes spill stores", part),
            spill_load_bytes=_number(r"(\d+) bytes spill loads", part),
            stack_bytes=_number(r"(\d+) bytes stack frame", part),
            shared_bytes=_number(r"(\d+) bytes smem", part),
        )
    return found


@lru_cache(maxsize=2)
def _load_nvrtc(library: Path) -> Nvrtc:
    return Nvrtc(library)


def _compile_with_nvcc(source: Path, arch: str, defines: Sequence[str]) -> Binary:
    nvcc = require_tool("nvcc", "compiling CUDA C++ needs NVRTC or nvcc, and neither is here")
    ptxas = require_tool("ptxas", "nvcc needs its assembler", beside=nvcc)
    with tempfile.TemporaryDirectory(prefix="titan-nvcc-") as folder:
        text = Path(folder) / "kernel.ptx"
        virtual = arch.replace("sm_", "compute_")
        macros = [f"-D{name}" for name in defines]
        command = [str(nvcc), "-ptx", f"-arch={virtual}", "-std=c++17", *macros, str(source), "-o", str(text)]
        _run(command, f"nvcc for {arch}")
        return assemble(text.read_text(), arch, ptxas=ptxas, compiler="nvcc")


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{what}: {first_error(done.stderr + done.stdout)}")
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
