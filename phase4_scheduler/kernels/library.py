"""The C++ of this folder as a library for this machine: built by its compiler at the first use, called by ctypes.

Built here and not shipped, because what makes these loops fast are the instructions of the CPU that runs them. OpenMP
is torch's: its library is in the process by then and has the same name, so both share one set of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import sys
from pathlib import Path

from module0_profiling import built, rooms
from module0_profiling.gpu_tools import MissingTool, find_host_compiler
from phase0_prototype.errors import UserError

HERE = Path(__file__).parent
SOURCES = ("product.cpp", "elementwise.cpp", "attention.cpp")
HEADERS = ("numbers.h",)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
BUILD = rooms.ROOT / "build" / "cpu"

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "norm": [*[_POINTER] * 3, *[_LONG] * 3, _FLOAT, _INT],
    "gate": [*[_POINTER] * 2, *[_LONG] * 2, _INT, _INT],
    "turn": [*[_POINTER] * 9, *[_LONG] * 8, _INT],
    "attend": [*[_POINTER] * 7, *[_LONG] * 8, _FLOAT, _FLOAT, _INT],
}
DTYPES = ("float32", "bfloat16")


class CpuKernelsMissing(UserError):
    """No library and no way to build one: one line. torch's operators do without."""


@functools.cache
def why_not_cpu_kernels(build: Path | None = None) -> str | None:
    """Why these kernels can't run here, in one line; None when they can. The first call builds them: 3 s."""
    try:
        library(build or BUILD)
    except CpuKernelsMissing as missing:
        return str(missing)
    return None


@functools.cache
def library(build: Path) -> ctypes.CDLL:
    """The library of these sources for this machine: loaded, and built before if it is not in `build`.

    Raises:
        CpuKernelsMissing: one line.
    """
    if sys.platform != "linux":
        raise CpuKernelsMissing(f"the CPU kernels are built on Linux only, not on {sys.platform}")
    import torch  # noqa: F401  its OpenMP must be in the process before ours asks for one

    file = file_of(build)
    if not file.exists():
        _build(file)
    try:
        found = ctypes.CDLL(str(file))
    except OSError as error:
        raise CpuKernelsMissing(f"the CPU kernels do not load ({error}): delete {file}") from None
    signatures = {f"{name}_{dtype}": arguments for name, arguments in SIGNATURES.items() for dtype in DTYPES}
    if found.has_product():
        signatures["product"] = [*[_POINTER] * 4, *[_LONG] * 3, _INT]
    for name, arguments in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = None, arguments
    return found


def file_of(build: Path) -> Path:
    """Where the library is, or will be: its name changes with the sources and with what the CPU can do."""
    text = [(HERE / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    digest = hashlib.sha256(b"\0".join([*text, *map(str.encode, FLAGS), _cpu()])).hexdigest()[:16]
    return build / f"libcpu-{platform.machine()}-{digest}.so"


def _cpu() -> bytes:
    """The kind of CPU and its instructions, as the kernel tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    wanted = (b"flags", b"Features", b"model\t", b"cpu family", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _build(file: Path) -> None:
    """Raises CpuKernelsMissing with the compiler's first error."""
    try:
        compiler = str(find_host_compiler())
    except MissingTool:
        raise CpuKernelsMissing("no C++ compiler is on PATH: install g++") from None
    if "clang" in Path(compiler).name:
        raise CpuKernelsMissing(f"{compiler} brings an OpenMP of its own beside torch's: install g++")

    def make(folder: Path) -> Path:
        what, made = "the CPU kernels", folder / "made.so"
        objects = [str(folder / source) + ".o" for source in SOURCES]
        each = [[compiler, *FLAGS, "-c", str(HERE / s), "-o", o] for s, o in zip(SOURCES, objects, strict=True)]
        built.run(each, folder, what)
        built.run([[compiler, "-shared", "-fopenmp", *objects, "-o", str(made)]], folder, what)
        return made

    try:
        built.build(file, make)
    except built.BuildError as error:
        raise CpuKernelsMissing(str(error)) from None
    except OSError as error:
        raise CpuKernelsMissing(f"cannot build the CPU kernels in {file.parent}: {error.strerror or error}") from None
