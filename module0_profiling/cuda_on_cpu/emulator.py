"""Compiles a ``.cu`` file for the CPU and launches its kernels on numpy arrays."""

from __future__ import annotations

import atexit
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from module0_profiling.cuda_on_cpu.traffic import CTraffic, Traffic
from module0_profiling.gpu_tools import CompileError, find_host_compiler
from module0_profiling.nvrtc import first_error

HERE = Path(__file__).parent
GUARD = 65536  # bytes around every buffer in which an access counts as out of bounds (kGuard in runtime.cpp)
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")


@dataclass(frozen=True)
class Pointer:
    """The address ``offset`` bytes into a contiguous array: what a kernel gets of a part of a tensor."""

    array: np.ndarray
    offset: int


Argument = np.ndarray | Pointer | int | float


class Emulator:
    """The kernels of one ``.cu`` file, compiled for this CPU with the macros ``defines``.

    Raises ``MissingTool`` without a C++ compiler and ``CompileError`` when the file does not compile.
    """

    def __init__(self, source: Path, defines: tuple[str, ...] = ()) -> None:
        self.source = source
        self.kernels = tuple(KERNEL.findall(_without_comments(source.read_text())))
        self._library = ctypes.CDLL(str(_build(source, self.kernels, defines)))

    def launch(self, kernel: str, grid: Sequence[int], block: Sequence[int], args: Sequence[Argument]) -> Traffic:
        """Runs ``kernel`` over ``grid`` x ``block`` (x, y, z; missing sizes are 1) and returns what it moved.

        Arrays are copied in and out (once, where several arguments are the same array or point into it), ints go as
        ``int``, floats as ``float``. Raises ValueError for an unknown kernel, a wrong number of arguments, or threads
        that wait for each other for ever.
        """
        if kernel not in self.kernels:
            raise ValueError(f"{self.source.name} has no kernel {kernel!r}: it has {', '.join(self.kernels)}")
        arity = int(getattr(self._library, f"cpu_arity_{kernel}")())
        if arity != len(args):
            raise ValueError(f"{kernel} takes {arity} arguments, got {len(args)}")
        guarded: dict[object, _Guarded] = {}
        values = [_value(arg, guarded) for arg in args]
        buffers = list(guarded.values())
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        addresses = (ctypes.c_size_t * len(buffers))(*(b.address for b in buffers))
        sizes = (ctypes.c_size_t * len(buffers))(*(b.array.nbytes for b in buffers))
        counts = CTraffic()
        entry = ctypes.cast(getattr(self._library, f"cpu_call_{kernel}"), ctypes.c_void_p)
        status = self._library.cpu_launch(
            entry, _sizes(grid), _sizes(block), pointers, len(buffers), addresses, sizes, ctypes.byref(counts)
        )
        if status != 0:
            raise ValueError(f"{kernel}: the threads of a block wait at different barriers for ever")
        for buffer in buffers:
            buffer.copy_back()
        return counts.freeze()


def emulator(source: Path, defines: tuple[str, ...] = ()) -> Emulator:
    """The emulator of a file, compiled once per process, version of the file and choice of macros."""
    return _cached(source.resolve(), source.stat().st_mtime_ns, defines)


@lru_cache(maxsize=64)
def _cached(source: Path, _modified: int, defines: tuple[str, ...]) -> Emulator:
    return Emulator(source, defines)


class _Guarded:
    """An array copied between two guard zones of NaN, aligned as a GPU allocation is (256 bytes)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._store = np.full(array.nbytes + 2 * GUARD + 256, 0xFF, dtype=np.uint8)
        self._start = GUARD + (-(self._store.ctypes.data + GUARD)) % 256
        self._inner[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self.address = int(self._store.ctypes.data) + self._start

    @property
    def _inner(self) -> np.ndarray:
        return self._store[self._start : self._start + self.array.nbytes]

    def copy_back(self) -> None:
        if self.array.flags.writeable:
            self.array[...] = self._inner.view(self.array.dtype).reshape(self.array.shape)


def _value(arg: Argument, guarded: dict[object, _Guarded]) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    """What the kernel is handed; an array that is not yet among the guarded ones joins them."""
    if isinstance(arg, int):
        return ctypes.c_int(arg)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    array, offset = (arg.array, arg.offset) if isinstance(arg, Pointer) else (arg, 0)
    key = (array.ctypes.data, array.shape, array.strides, array.dtype)
    if key not in guarded:
        guarded[key] = _Guarded(array)
    return ctypes.c_void_p(guarded[key].address + offset)


def _sizes(shape: Sequence[int]) -> ctypes.Array[ctypes.c_uint]:
    return (ctypes.c_uint * 3)(*(*shape, 1, 1, 1)[:3])


def _build(source: Path, kernels: tuple[str, ...], defines: tuple[str, ...]) -> Path:
    compiler, folder = find_host_compiler(), _build_folder()
    key = re.sub(r"\W", "_", "_".join([str(source.resolve()), *defines])) + f"_{source.stat().st_mtime_ns}"
    unit, obj, library = (folder / (key + end) for end in (".cpp", ".o", ".so"))
    entries = [f'extern "C" void cpu_call_{k}(void** args) {{ cpu_call(&{k}, args); }}' for k in kernels]
    arities = [f'extern "C" int cpu_arity_{k}() {{ return cpu_arity(&{k}); }}' for k in kernels]
    unit.write_text(
        "\n".join([f'#include "{HERE / "device.h"}"', f'#include "{source.resolve()}"', *entries, *arities])
    )
    # -O0 on purpose: what is counted is what the source says, not what one optimiser made of it.
    flags = ["-std=c++17", "-O0", "-fPIC", "-w", "-fsanitize=thread", *(f"-D{name}" for name in defines)]
    if sys.platform != "darwin" and "clang" not in compiler.name:
        flags.append("-fno-gnu-unique")  # else templates of two libraries share their static arrays
    _run([str(compiler), *flags, "-c", str(unit), "-o", str(obj)], source)
    _run([str(compiler), "-shared", str(obj), str(_runtime()), "-o", str(library)], source)
    return library


@lru_cache(maxsize=1)
def _runtime() -> Path:
    obj = _build_folder() / "runtime.o"
    source = HERE / "runtime.cpp"
    flags = ["-std=c++17", "-O2", "-fPIC", "-w", *(["-D_XOPEN_SOURCE=700"] if sys.platform == "darwin" else [])]
    _run([str(find_host_compiler()), *flags, "-c", str(source), "-o", str(obj)], source)
    return obj


@lru_cache(maxsize=1)
def _build_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="titan-cuda-on-cpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(command: list[str], source: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{Path(command[0]).name}: {source.name}: {first_error(done.stderr)}")


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
