"""What a gate needs from the machine, and why it is absent.

A need is `cpu`, `amx` (an Intel CPU with matrix units), `cuda`, `cuda:N` (N devices), `triton`, `nvcc`, `nvrtc` (or
nvcc), `compiler` (a host C++ compiler), `rust`, `vllm-peer` (vLLM in an environment of its own: the interpreter that
TITAN_VLLM_PYTHON names, or .peers/vllm/bin/python), or the name of a Python package; several are joined by commas.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from module0_profiling.course.errors import CourseError
from module0_profiling.device import detect
from module0_profiling.gpu_tools import find_nvrtc

NEED = re.compile(r"cuda:[1-9]\d*|[a-z_][a-z0-9_.-]*")


def split(needs: str) -> tuple[str, ...]:
    """`cuda,flashinfer` as a tuple.

    Raises:
        CourseError: empty, or a need that is spelt like none of them.
    """
    found = tuple(need.strip() for need in needs.split(","))
    for need in found:
        if not NEED.fullmatch(need):
            known = "cpu, amx, cuda, cuda:N, triton, nvcc, nvrtc, compiler, rust, vllm-peer or a Python package"
            raise CourseError(f"needs {need!r} is not {known}")
    return found


def absent(needs: str) -> str | None:
    """The first need that this machine lacks, as `needs cuda:2, 1 device is here`; None when all are met."""
    return next((reason for need in split(needs) if (reason := _absent(need))), None)


def _absent(need: str) -> str | None:
    if need == "cuda" or need.startswith("cuda:"):
        return _absent_cuda(need)
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl")
    tools: dict[str, tuple[Callable[[], object], str]] = {
        "cpu": (lambda: True, ""),
        "amx": (lambda: "amx_bf16" in detect("cpu").features, "needs a CPU with AMX"),
        "nvcc": (_nvcc, "needs nvcc, there is none on PATH or in CUDA_HOME"),
        "nvrtc": (lambda: find_nvrtc() or _nvcc(), "needs NVRTC or nvcc: pip install nvidia-cuda-nvrtc"),
        "compiler": (lambda: any(n and shutil.which(n) for n in names), "needs a C++ compiler, none is on PATH"),
        "vllm-peer": (
            lambda: Path(os.environ.get("TITAN_VLLM_PYTHON", ".peers/vllm/bin/python")).is_file(),
            "needs vLLM in an environment of its own: phase4_scheduler/measures/vllm_peer.py says how",
        ),
        "pytest": (lambda: _installed("pytest"), "needs pytest, which make setup installs"),
        "rust": (lambda: shutil.which("cargo") or shutil.which("rustc"), "needs Rust: https://rustup.rs"),
    }
    found, missing = tools.get(
        need, (lambda: _installed(need), f"needs the Python package {need}, it is not installed")
    )
    return None if found() else missing


def _absent_cuda(need: str) -> str | None:
    if not _installed("torch"):
        return f"needs {need}, PyTorch is not installed"
    import torch

    wanted = int(need.partition(":")[2] or 1)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return None if here >= wanted else f"needs {need}, {here} CUDA device{'s' * (here != 1)} here"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def _installed(package: str) -> bool:
    if package in sys.modules:
        return True
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
