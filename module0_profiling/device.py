"""What is this machine? Read from the operating system and the driver, without importing torch.

A `Device` is one processor that can run the engine: the CPU, a CUDA GPU or Apple's GPU. Its fingerprint names the
hardware, so that a measured peak is never used on another machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The instruction sets that decide how fast a matrix product runs: the names of /proc/cpuinfo.
X86_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
ARM_FEATURES = ("asimd", "bf16", "i8mm", "sve", "sve2")

# CUdevice_attribute numbers of the CUDA driver API (cuda.h)
SM_COUNT, L2_BYTES, CAPABILITY_MAJOR, CAPABILITY_MINOR = 16, 38, 75, 76


class DeviceError(ValueError):
    """A device was asked for that this machine does not have: one line with the remedy."""

    is_user_error = True  # the command line prints it as one line


@dataclass(frozen=True)
class Device:
    """One processor.

    Attributes:
        kind: "cpu", "cuda" or "mps".
        name: what the vendor calls it.
        units: CPU cores that this process may use, streaming multiprocessors, or 0 where unknown.
        memory_bytes: of the device; on a CPU all of the machine's.
        cache_bytes: last-level cache (all L3 of a CPU, L2 of a GPU), 0 where unknown.
        features: instruction sets of a CPU; ("sm_90",) of a GPU.
        driver: the GPU driver's version, "" on a CPU.
        index: which GPU.
    """

    kind: str
    name: str
    units: int
    memory_bytes: int
    cache_bytes: int = 0
    features: tuple[str, ...] = ()
    driver: str = ""
    index: int = 0

    @property
    def fingerprint(self) -> str:
        """One line that two machines share only when they have the same hardware (the driver is left out)."""
        unit = "SMs" if self.kind == "cuda" else "cores"
        parts = (self.kind, self.name, f"{self.units} {unit}", f"{self.memory_bytes / 2**30:.0f} GiB")
        return ", ".join((*parts, " ".join(self.features))).removesuffix(", ")

    @property
    def torch_name(self) -> str:
        """The name for `torch.device`: "cpu", "cuda:0", "mps"."""
        return f"cuda:{self.index}" if self.kind == "cuda" else self.kind


def detect(kind: str | None = None) -> Device:
    """The device of a kind ("cpu", "cuda", "cuda:1", "mps"), or the fastest there is when `kind` is None.

    Raises:
        DeviceError: when the machine has no such device.
    """
    wanted, _, index = (kind or "").partition(":")
    if wanted == "cpu":
        return _cpu()
    if wanted in ("", "cuda"):
        gpus = _cuda_devices()
        number = int(index) if index.isdigit() else 0
        if number < len(gpus):
            return gpus[number]
        if wanted:
            raise DeviceError(f"device {kind}: {len(gpus)} CUDA devices found, use --device cpu or see `titan doctor`")
    if wanted in ("", "mps"):
        apple = _mps()
        if apple:
            return apple
        if wanted:
            raise DeviceError("device mps: this is not an Apple machine with a GPU, use --device cpu")
    if wanted:
        raise DeviceError(f"device {kind!r} is unknown: use cpu, cuda, cuda:<n> or mps")
    return _cpu()


def describe_machine() -> dict[str, Any]:
    """The machine as plain data for a result file: {"cpu": {...}, "gpu": {...} or None, "system": "Linux x86_64"}."""
    gpus = _cuda_devices()
    gpu = gpus[0] if gpus else _mps()
    return {
        "cpu": _plain(_cpu()),
        "gpu": _plain(gpu) | {"count": max(1, len(gpus))} if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _plain(device: Device) -> dict[str, Any]:
    return asdict(device) | {"features": list(device.features), "fingerprint": device.fingerprint}


@cache
def _cpu() -> Device:
    if platform.system() == "Darwin":
        return _apple_cpu()
    name, features = parse_cpuinfo(_text("/proc/cpuinfo"))
    return Device(
        kind="cpu",
        name=name or platform.processor() or platform.machine(),
        units=usable_cores(),
        memory_bytes=total_memory(),
        cache_bytes=_l3_bytes(Path("/sys/devices/system/cpu")),
        features=features,
    )


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and matrix-relevant features of the first processor of a /proc/cpuinfo.

    Clouds hide the model's name ("AMD EPYC"), so family and model number are added: they tell Zen 3 from Zen 4.
    """
    first: dict[str, str] = {}
    for line in text.split("\n\n", maxsplit=1)[0].splitlines():
        key, _, value = line.partition(":")
        first[key.strip().lower()] = value.strip()
    flags = set((first.get("flags") or first.get("features") or "").split())
    name = first.get("model name", "")
    if name and "cpu family" in first and "model" in first:
        name = f"{name} (family {first['cpu family']} model {first['model']})"
    return name, tuple(flag for flag in (*X86_FEATURES, *ARM_FEATURES) if flag in flags)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of main memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _l3_bytes(cpus: Path) -> int:
    """Sum of the distinct L3 caches: a large server has several, each shared by some of the cores."""
    sizes: dict[str, int] = {}
    for cache_folder in cpus.glob("cpu[0-9]*/cache/index3"):
        size = re.fullmatch(r"(\d+)([KMG])", _text(cache_folder / "size").strip())
        if size:
            shared_by = _text(cache_folder / "shared_cpu_list").strip()
            sizes[shared_by] = int(size[1]) << {"K": 10, "M": 20, "G": 30}[size[2]]
    return sum(sizes.values())


def _apple_cpu() -> Device:
    wanted = ("FEAT_BF16", "FEAT_I8MM", "FEAT_SME")
    features = tuple(f.removeprefix("FEAT_").lower() for f in wanted if _sysctl(f"hw.optional.arm.{f}") == "1")
    memory = _sysctl("hw.memsize")
    name = _sysctl("machdep.cpu.brand_string") or "Apple"
    return Device("cpu", name, usable_cores(), int(memory) if memory.isdigit() else 0, features=features)


@cache
def _mps() -> Device | None:
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    cpu = _apple_cpu()
    return Device("mps", f"{cpu.name} GPU", 0, cpu.memory_bytes)


@cache
def _cuda_devices() -> tuple[Device, ...]:
    """Every visible GPU, asked through the CUDA driver's C interface; empty without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        count = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return ()
        return tuple(_cuda_device(driver, index) for index in range(count.value))
    except (OSError, AttributeError):
        return ()


def _cuda_device(driver: Any, index: int) -> Device:
    handle, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    return Device(
        kind="cuda",
        name=name.value.decode(errors="replace"),
        units=attribute(SM_COUNT),
        memory_bytes=memory.value,
        cache_bytes=attribute(L2_BYTES),
        features=(f"sm_{attribute(CAPABILITY_MAJOR)}{attribute(CAPABILITY_MINOR)}",),
        driver=_driver_version(),
        index=index,
    )


def _driver_version() -> str:
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", _text("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _sysctl(key: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=2).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
