"""What datasheets say of processors: ceilings to plan with where nothing can be measured. The data: catalogue.toml.

A number that the named document does not state, or states for another variant, is left out: a prediction then says
what is missing. Rates are dense, without sparsity; those of GeForce cards are with float32 sums. Servers' CPUs have no
rate: what they reach depends on a clock under load that no datasheet promises; `titan peaks` measures it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from module0_profiling.device import DeviceError

OTHER_VARIANTS = frozenset({"pcie", "nvl", "laptop", "d", "ti", "mig", "q"})
"""Words of a device's name that mark a slower or different relative of a listed part."""

GB, KIB = 10**9, 2**10


@dataclass(frozen=True)
class Entry:
    """One processor as its maker describes it; None or absent: not stated.

    Attributes:
        key: what `--device` takes.
        name: what the vendor calls it.
        kind: "cuda", "rocm", "mps" or "cpu".
        bandwidth: of the memory, bytes/s, with the fastest memory that the document allows.
        source: document and table.
        rates: dtype -> FLOP/s (int8: operations/s) of a dense matrix product.
        memory: bytes; None for CPUs, whose memory is what was plugged in. Apple: the largest that is sold.
        cache: last-level cache in bytes: L2 of an NVIDIA GPU, Infinity Cache, all L3 of a CPU.
        shared: shared memory that the blocks on one SM can use together (LDS of a CU), bytes.
        units: streaming multiprocessors, compute units, GPU cores, or CPU cores.
        link: bytes/s to its neighbours in one direction, all links together.
        words: words that a device's reported name must have.
        without: words that it must not have.
    """

    key: str
    name: str
    kind: str
    bandwidth: float
    source: str
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    memory: int | None = None
    cache: int | None = None
    shared: int | None = None
    units: int | None = None
    link: float | None = None
    words: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()


@cache
def catalogue() -> Mapping[str, Entry]:
    """All entries by key, in the order of the file."""
    text = files("module0_profiling").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return MappingProxyType({key: _entry(key, row) for key, row in tomllib.loads(text).items()})


def find(name: str) -> Entry:
    """The entry of a key ("h200", "a100-40gb"), whatever its case.

    Raises:
        DeviceError: one line that lists what exists.
    """
    entries = catalogue()
    entry = entries.get(name.strip().lower().replace(" ", "-"))
    if entry is None:
        raise DeviceError(f"device {name!r} is unknown: use here, cpu, cuda, mps, or one of {', '.join(entries)}")
    return entry


def match(name: str) -> Entry | None:
    """The entry of a device by the name that its driver reports ("NVIDIA H200"), or None.

    Slower variants that share a word (PCIe, NVL, laptop, MIG slices) match nothing, rather than a wrong entry.
    """
    words = set(name.lower().replace("-", " ").split())
    if words & OTHER_VARIANTS:
        return None
    return next((e for e in catalogue().values() if e.words <= words and not e.without & words), None)


def _entry(key: str, row: Mapping[str, Any]) -> Entry:
    """From the units of the file (GB/s, TFLOP/s, GB, KiB) to bytes and seconds."""

    def scaled(name: str, unit: int) -> int | None:
        return round(row[name] * unit) if name in row else None

    return Entry(
        key=key,
        name=row["name"],
        kind=row["kind"],
        bandwidth=row["bandwidth_gb_s"] * GB,
        source=row["source"],
        rates=MappingProxyType({dtype: rate * 1e12 for dtype, rate in row.get("tflops", {}).items()}),
        memory=scaled("memory_gb", GB),
        cache=scaled("cache_kib", KIB),
        shared=scaled("shared_kib", KIB),
        units=row.get("units"),
        link=scaled("link_gb_s", GB),
        words=frozenset(row.get("words", [key])),
        without=frozenset(row.get("without", ())),
    )
