"""NVRTC, NVIDIA's runtime compiler, through ctypes: CUDA C++ text in, PTX and machine code out, no GPU needed.

Source: the NVRTC user guide, "Basic Usage" (https://docs.nvidia.com/cuda/nvrtc/).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from module0_profiling.gpu_tools import CompileError


@dataclass(frozen=True)
class NvrtcOutput:
    """What one compilation yields: ``cubin`` (ELF machine code), ``ptx`` (text), ``log`` (ptxas -v lines)."""

    cubin: bytes
    ptx: str
    log: str


class Nvrtc:
    """One loaded libnvrtc."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: str, name: str, arch: str, defines: Sequence[str] = ()) -> NvrtcOutput:
        """Compiles ``source`` for ``arch`` (``sm_90``) with the macros ``defines``.

        Raises ``CompileError`` with the first line of the log.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
            options += [f"--define-macro={name}" for name in defines]
            array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            status = self._lib.nvrtcCompileProgram(program, len(options), array)
            log = self._read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode(errors="replace")
            if status != 0:
                raise CompileError(f"NVRTC {self.version} for {arch}: {first_error(log)}")
            ptx = self._read(program, "nvrtcGetPTXSize", "nvrtcGetPTX").decode()
            return NvrtcOutput(self._read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), ptx, log)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, size_function: str, read_function: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_function, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        self._call(read_function, program, buffer)
        return buffer.raw if "CUBIN" in read_function else buffer.value

    def _call(self, function: str, *args: object) -> None:
        status = getattr(self._lib, function)(*args)
        if status != 0:
            get_text = self._lib.nvrtcGetErrorString
            get_text.restype = ctypes.c_char_p
            raise CompileError(f"NVRTC {function} failed: {get_text(status).decode()}")


def first_error(log: str) -> str:
    """The first line of a compiler's log that names an error, else its first line."""
    lines = [line.strip() for line in log.replace("\0", "").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return (errors or lines or ["no message"])[0]
