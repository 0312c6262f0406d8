"""Finds the compilers and disassemblers of the CUDA world, wherever this machine keeps them.

None of them needs a GPU. They come from a CUDA toolkit, from NVIDIA's wheels on PyPI, or bundled inside the Triton
wheel. A tool that is missing is not a bug of the caller: it raises ``MissingTool`` with one line that a command prints.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

HOW_TO_GET = {
    "nvrtc": "pip install nvidia-cuda-nvrtc",
    "nvcc": "pip install nvidia-cuda-nvrtc (compiles without nvcc), or install the CUDA toolkit",
    "ptxas": "pip install triton (Linux; it bundles ptxas), or install the CUDA toolkit",
    "nvdisasm": "pip install nvidia-cuda-nvdisasm, or triton (Linux; it bundles nvdisasm)",
    "c++": "install a C++17 compiler: apt install g++, or xcode-select --install",
    "triton": "pip install triton (Linux only)",
}


class MissingTool(RuntimeError):
    """A program or library that this job needs is not on this machine; the message is one line with the remedy."""

    is_user_error = True  # a command line prints the message alone

    def __init__(self, tool: str, why: str) -> None:
        super().__init__(f"{tool} not found: {why}. To get it: {HOW_TO_GET[tool]}")
        self.tool = tool


class CompileError(RuntimeError):
    """A compiler refused its input; the message holds the compiler, the file and the first error."""

    is_user_error = True


def find_tool(name: str, *, beside: Path | None = None) -> Path | None:
    """Path of an executable such as ``ptxas``, or None. ``beside`` names a file whose folder is searched first."""
    folders = ([beside.parent] if beside else []) + list(_toolkit_folders()) + list(_wheel_folders("bin"))
    for folder in folders:
        candidate = folder / name
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    bundled = _triton_folder()
    return bundled / name if bundled and (bundled / name).is_file() else None


def require_tool(name: str, why: str, *, beside: Path | None = None) -> Path:
    """Like ``find_tool``, but raises ``MissingTool`` with ``why`` when there is none."""
    found = find_tool(name, beside=beside)
    if found is None:
        raise MissingTool(name, why)
    return found


def find_nvrtc() -> Path | None:
    """Path of the newest libnvrtc of a wheel or toolkit, or None (always None on macOS: NVIDIA ships none)."""
    folders = [*_wheel_folders("lib"), *(f.parent / "lib64" for f in _toolkit_folders())]
    for folder in folders:
        libraries = [p for p in folder.glob("libnvrtc.so.*") if "builtins" not in p.name and "alt" not in p.name]
        if libraries:
            return max(libraries, key=lambda p: (_major(p.name), p.name))
    return None


def find_host_compiler() -> Path:
    """Path of a C++ compiler for this CPU ($CXX, c++, g++ or clang++); raises ``MissingTool`` when there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found)
    raise MissingTool("c++", "the .cu files are compiled for the CPU to check and count them without a GPU")


def _toolkit_folders() -> Iterator[Path]:
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root and (Path(root) / "bin").is_dir():
            yield Path(root) / "bin"


def _wheel_folders(kind: str) -> Iterator[Path]:
    """``nvidia/cu13/<kind>`` (CUDA 13 wheels) and ``nvidia/cuda_nvrtc/<kind>`` (CUDA 12 wheels), newest first."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        yield from sorted((p for p in Path(root).glob(f"*/{kind}") if p.is_dir()), reverse=True)


def _triton_folder() -> Path | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"


def _major(file_name: str) -> int:
    digits = file_name.rsplit(".so.", maxsplit=1)[-1].split(".", maxsplit=1)[0]
    return int(digits) if digits.isdigit() else 0
