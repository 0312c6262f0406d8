"""`titan doctor`: the tool chain and the machine, one line each: what was found, or why it matters and how to get it.

Every probe runs at the same time and has a second and a half; nothing is imported that is slow or may be broken. A
probe never raises because something is absent: a missing tool is a line, and the course goes on without it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from module0_profiling import device, gpu_tools

if TYPE_CHECKING:
    from rich.table import Table

PROBE_SECONDS = 1.5
VERSION = re.compile(r"\d+\.\d+(?:\.\d+)*")


@dataclass(frozen=True)
class Check:
    """One line of the table: `probe` returns what it found, or None when it is missing."""

    name: str
    probe: Callable[[], str | None]
    why: str
    get: str


@dataclass(frozen=True)
class Finding:
    """The answer to a check; `found` is None when it is missing."""

    name: str
    found: str | None
    why: str
    get: str


def examine(checks: tuple[Check, ...] | None = None) -> list[Finding]:
    """Run all checks at once, in the order in which they are shown. Never raises because something is absent."""
    wanted = CHECKS if checks is None else checks
    with ThreadPoolExecutor(max_workers=max(1, len(wanted))) as pool:
        return list(pool.map(_answer, wanted))


def _answer(check: Check) -> Finding:
    try:
        found = check.probe()
    except Exception as error:  # a broken driver or tool may fail in any way, and must cost its own line only
        found = None if isinstance(error, FileNotFoundError) else f"broken: {str(error).splitlines()[0][:80]}"
    return Finding(check.name, found or None, check.why, check.get)


def table(findings: list[Finding]) -> Table:
    """The findings as a rich table."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title="titan doctor", title_justify="left")
    drawn.add_column("what", no_wrap=True)
    drawn.add_column("found", overflow="fold")
    drawn.add_column("if missing: why it matters, how to get it", overflow="fold")
    for finding in findings:
        if finding.found is None:
            drawn.add_row(finding.name, Text("missing", style="yellow"), f"{finding.why}. {finding.get}")
        else:
            style = "red" if finding.found.startswith("broken") else "green"
            drawn.add_row(finding.name, Text(finding.found, style=style), finding.get if style == "red" else "")
    return drawn


def _package(name: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> str | None:
    version = _package("torch")
    if version is None:
        return None
    built = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
    text = built.read_text(encoding="utf-8") if built.exists() else ""
    cuda = re.search(r"^cuda\b.*?=\s*'([\d.]+)'", text, re.MULTILINE)
    hip = re.search(r"^hip\b.*?=\s*'([\w.]+)'", text, re.MULTILINE)
    return f"{version} ({f'CUDA {cuda[1]}' if cuda else f'ROCm {hip[1]}' if hip else 'no CUDA'})"


def _profiler() -> str | None:
    """torch's own; GPU kernels are on its timeline where CUPTI is installed."""
    if _package("torch") is None:
        return None
    cupti = next((found for name in CUPTI if (found := _package(name))), None)
    return f"CPU operators, GPU kernels by CUPTI {cupti}" if cupti else "CPU operators"


def _counters(params: Path = Path("/proc/driver/nvidia/params")) -> str | None:
    """Whether this user may read a GPU's counters; None without NVIDIA's driver."""
    if not params.exists():
        return None
    admin_only = re.search(r"RmProfilingAdminOnly:\s*1", params.read_text()) is not None
    if admin_only and os.geteuid() != 0:
        return "broken: the driver shows them to administrators only"
    return "administrators only, as which this runs" if admin_only else "for every user"


def _tool(name: str, *arguments: str) -> Callable[[], str | None]:
    """A probe for a program: the last version-like number that it prints, and where it is."""

    def probe() -> str | None:
        path = gpu_tools.find_tool(name)
        if path is None:
            return None
        try:
            done = subprocess.run(
                [str(path), *(arguments or ("--version",))], capture_output=True, text=True, timeout=PROBE_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"{path} (did not say its version within {PROBE_SECONDS} s)"
        numbers = VERSION.findall(done.stdout + done.stderr)
        return f"{numbers[-1] if numbers else 'unknown version'}, {path}"

    return probe


def _compiler() -> str | None:
    try:
        path = gpu_tools.find_host_compiler()
    except gpu_tools.MissingTool:
        return None
    done = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=PROBE_SECONDS)
    return f"{(done.stdout.splitlines() or ['unknown version'])[0]}, {path}"


def _nvrtc() -> str | None:
    path = gpu_tools.find_nvrtc()
    return str(path) if path else None


def _cpu() -> str:
    cpu = device.detect("cpu")
    return f"{cpu.name}, {cpu.units} cores usable, {cpu.cache_bytes >> 20} MiB of L3"


def _avx512() -> str | None:
    return " ".join(flag for flag in device.detect("cpu").features if flag.startswith("avx512")) or None


def _matrix_units() -> str | None:
    wanted = ("amx", "i8mm", "sme")
    return " ".join(flag for flag in device.detect("cpu").features if flag.startswith(wanted)) or None


def _gpu() -> str | None:
    """The GPU, from the driver's C interface, in a process of its own: a broken driver can hang or crash."""
    program = (
        "from module0_profiling import device as d; g = d.detect(); print(g.kind, g.fingerprint, g.driver, sep='|')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"broken: the driver did not answer within {PROBE_SECONDS} s"
    kind, fingerprint, driver = (done.stdout.strip() or "||").split("|")
    return f"{fingerprint}{f', driver {driver}' if driver else ''}" if kind in ("cuda", "mps") else None


def _huge_pages() -> str | None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    if chosen is None or chosen[1] == "never":
        return None
    return f"transparent: {chosen[1]}" + (" (THP_MEM_ALLOC_ENABLE=1 uses them)" if chosen[1] == "madvise" else "")


def _memory() -> str:
    total = device.total_memory() / 2**30
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return f"{int(free[1]) / 2**20:.1f} of {total:.1f} GiB free" if free else f"{total:.1f} GiB"


def _disk() -> str:
    return f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here"


def _hub() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    return "offline by HF_HUB_OFFLINE" if offline else "not probed: used only when you name a hub model"


def _python() -> str:
    return f"{platform.python_version()}, {sys.executable}"


CUPTI = ("nvidia-cuda-cupti", "nvidia-cuda-cupti-cu13", "nvidia-cuda-cupti-cu12")
TOOLKIT = "Comes with the CUDA toolkit: https://developer.nvidia.com/cuda-downloads"
CHECKS = (
    Check("python", _python, "Runs everything", "Python 3.11 or later: https://python.org"),
    Check("torch", _torch, "Tensors, and the oracle of every kernel", "pip install torch"),
    Check("triton", lambda: _package("triton"), "Kernels of phases 2 to 6; the CPU path needs none",
          "pip install triton (Linux only)"),
    Check("transformers", lambda: _package("transformers"), "The oracle that logits are compared with",
          "pip install transformers"),
    Check("GPU", _gpu, "GPU kernels and their figures; everything else runs on the CPU",
          "Install NVIDIA's driver, or go on without"),
    Check("nvcc", _tool("nvcc"), "Compiles CUDA C++ from the command line; NVRTC does too", TOOLKIT),
    Check("NVRTC", _nvrtc, "Compiles CUDA C++ without a toolkit or a GPU", gpu_tools.HOW_TO_GET["nvrtc"]),
    Check("ptxas", _tool("ptxas"), "Registers and spills of a kernel, with no GPU", gpu_tools.HOW_TO_GET["ptxas"]),
    Check("ncu", _tool("ncu"), "Counters of one kernel: bandwidth, occupancy, stalls", TOOLKIT),
    Check("nsys", _tool("nsys"), "Timeline of the whole engine; torch.profiler does much of it", TOOLKIT),
    Check("GPU counters", _counters, "What ncu reads; without the right to, it ends with ERR_NVGPUCTRPERM",
          "options nvidia NVreg_RestrictProfilingToAdminUsers=0 in /etc/modprobe.d, or run ncu as root"),
    Check("torch.profiler", _profiler, "A timeline of operators and GPU kernels", "pip install torch"),
    Check("C++ compiler", _compiler, "torch.compile on the CPU, and the .cu files run without a GPU",
          "apt install g++, or xcode-select --install"),
    Check("cargo", _tool("cargo"), "Builds the Rust allocator of phase 1; the Python one works without",
          "https://rustup.rs"),
    Check("CPU", _cpu, "", ""),
    Check("AVX-512", _avx512, "bfloat16 and wide vectors on x86; without it products run in float32 AVX2",
          "A property of the CPU"),
    Check("matrix units", _matrix_units, "AMX (Intel) or I8MM/SME (ARM): prefill on a CPU is several times faster",
          "A property of the CPU"),
    Check("huge pages", _huge_pages, "Up to 10 % of decode on a CPU: fewer TLB misses over the weights",
          "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled (Linux)"),
    Check("memory", _memory, "", ""),
    Check("disk", _disk, "", ""),
    Check("Hugging Face hub", _hub, "", ""),
)  # fmt: skip
