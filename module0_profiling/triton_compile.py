"""Compiles Triton kernels ahead of time for any NVIDIA GPU, without one and without a driver.

A module with Triton kernels names what to compile in a tuple ``AOT`` of ``TritonBuild``. Source of the method: Triton's
``tools/compile.py``, which builds an ``ASTSource`` from a signature and hands it to ``triton.compile``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from module0_profiling.cuda_compile import Binary, assemble
from module0_profiling.gpu_tools import CompileError, MissingTool

TRAP = re.compile(
    r"^\s*trap;", re.MULTILINE
)  # what Triton makes of a kernel that tensor memory can't hold, and no error
WRITE = re.compile(r"^\s*(@\S+ )?(st|red|atom|cp\.async\.bulk)[.\w:]*\.global", re.MULTILINE)
DIVISIBILITY = 16  # pointers and strides that are multiples of 16: without the promise there are no 128-bit loads


@dataclass(frozen=True)
class TritonBuild:
    """One build of a ``@triton.jit`` function.

    ``signature`` maps each runtime argument to its Triton type (``*fp32``, ``i32``), ``constants`` each
    ``tl.constexpr``; ``divisible`` names the arguments that are multiples of 16.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, int | bool | str]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    extra: Mapping[str, Any] = field(default_factory=dict)


def compile_triton(build: TritonBuild, arch: str) -> tuple[Binary, int]:
    """Compiles ``build`` for ``arch``; returns the binary and the bytes of shared memory that a launch asks for.

    Raises ``MissingTool`` without Triton, ``CompileError`` when a pass fails or under TRITON_INTERPRET=1.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import get_ptxas
        from triton.compiler import ASTSource
    except ImportError as error:
        raise MissingTool("triton", "the Triton kernels are compiled with it") from error

    capability = int(arch.removeprefix("sm_").rstrip("af"))
    signature = {name: build.signature.get(name, "constexpr") for name in _argument_names(build)}
    attributes = {(list(signature).index(name),): [["tt.divisibility", DIVISIBILITY]] for name in build.divisible}
    source = ASTSource(build.kernel, signature, constexprs=dict(build.constants), attrs=attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True, **build.extra}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # a pass that fails raises many types, some of them private
        raise CompileError(f"Triton {triton.__version__} for {arch}, {build.label}: {error}".splitlines()[0]) from error
    if TRAP.search(compiled.asm["ptx"]) and not WRITE.search(compiled.asm["ptx"]):
        raise CompileError(
            f"Triton {triton.__version__} for {arch}, {build.label}: all of it became a trap, it is too big"
        )
    ptxas = Path(get_ptxas(capability).path)
    ptx_target = _ptx_target(compiled.asm["ptx"]) or arch
    binary = assemble(compiled.asm["ptx"], ptx_target, ptxas=ptxas, compiler=f"Triton {triton.__version__}")
    return binary, int(compiled.metadata.shared)


def _argument_names(build: TritonBuild) -> list[str]:
    names = getattr(build.kernel, "arg_names", None)
    if names is None or type(build.kernel).__name__ == "InterpretedFunction":
        raise CompileError(f"{build.label}: cannot compile under TRITON_INTERPRET=1, unset it")
    return list(names)


def _ptx_target(ptx: str) -> str | None:
    for line in ptx.splitlines():
        if line.startswith(".target"):
            return line.split()[1].rstrip(",")
    return None
