"""This machine's peaks: measured once, kept per fingerprint, used in preference to any datasheet.

A datasheet says what a chip could do; a measurement says what a program in torch can reach on this machine today. The
engine's efficiency is stated against the second. `device.py` finds the hardware, `peak_measure.py` runs the loops.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from module0_profiling import catalogue
from module0_profiling.device import Device, DeviceError, describe_machine, detect
from module0_profiling.results import write_atomically
from module0_profiling.roofline import Roof
from module0_profiling.timing import Crowd

__all__ = ["Device", "DeviceError", "Peaks", "best_known_peaks", "catalogue_peaks", "datasheet_peaks"]
__all__ += ["describe_machine", "detect", "measured_peaks"]


@dataclass(frozen=True)
class Peaks:
    """The ceilings of one device.

    Attributes:
        read_bandwidth: bytes/s of a read-only pass; what decoding is bound by.
        copy_bandwidth: bytes/s of a copy, bytes read plus bytes written.
        matmul: dtype name ("bfloat16") -> FLOP/s of a square matrix product. Dtypes that crawl are left out.
        source: "measured" or "datasheet".
        read_method: which loop reached `read_bandwidth`, e.g. "float32 sum".
        fingerprint: of the device.
        load: processes that were running when it was measured (1-minute load average); above 0.5 a core, measure again.
    """

    read_bandwidth: float
    copy_bandwidth: float
    matmul: dict[str, float] = field(default_factory=dict)
    source: str = "measured"
    read_method: str = ""
    fingerprint: str = ""
    load: float = 0.0

    def roof(self, dtype: str = "bfloat16") -> Roof:
        """The roofline of a dtype: its matmul rate over the read bandwidth.

        Raises:
            KeyError: when the device has no rate for that dtype; the message names those it has.
        """
        if dtype not in self.matmul:
            raise KeyError(f"no matmul rate for {dtype}, only for {', '.join(self.matmul) or 'nothing'}")
        return Roof(flops=self.matmul[dtype], bandwidth=self.read_bandwidth, name=dtype)


def measured_peaks(device: Device | None = None, *, refresh: bool = False) -> Peaks:
    """The measured peaks of a device (default: the fastest here), from the cache or, once, in under 3 s on a CPU.

    A benchmark that publishes a share of the peak passes `refresh=True`, so that both come from the same run: that
    returns what was measured now, even where the cache keeps a higher value from a quieter time.
    A cache that cannot be read or written costs a new measurement, never an error.
    """
    device = device or detect()
    if not refresh and (known := _read_cache().get(device.fingerprint)):
        return known
    from module0_profiling.peak_measure import measure

    crowd = Crowd()
    peaks, cached = measure(device), _read_cache()
    kept = cached.get(device.fingerprint)
    busy = device.kind == "cpu" and (crowd.crowded or peaks.load > 0.5 * max(1, device.units))
    _write_cache({**cached, device.fingerprint: _higher(kept, peaks) if kept and busy else peaks})
    return peaks


def _higher(kept: Peaks, new: Peaks) -> Peaks:
    """The better of two measurements, rate by rate: a busy neighbour can only lower what is measured."""
    matmul = {
        dtype: max(kept.matmul.get(dtype, 0.0), new.matmul.get(dtype, 0.0)) for dtype in {**kept.matmul, **new.matmul}
    }
    winner = max(kept, new, key=lambda peaks: peaks.read_bandwidth)
    return replace(winner, copy_bandwidth=max(kept.copy_bandwidth, new.copy_bandwidth), matmul=matmul)


def best_known_peaks(device: Device) -> Peaks | None:
    """Peaks without measuring anything: the cached measurement, else the datasheet, else None."""
    return _read_cache().get(device.fingerprint) or datasheet_peaks(device.name)


def datasheet_peaks(name: str) -> Peaks | None:
    """Datasheet peaks of a device by a word of its name ("h200", "NVIDIA H200"), or None when it is not listed.

    Slower variants that share the word (PCIe, NVL, laptop) are not listed, rather than given the wrong peaks; nor is a
    part of which no document states a rate (see `catalogue.py`).
    """
    entry = catalogue.match(name)
    return catalogue_peaks(entry) if entry and entry.rates else None


def catalogue_peaks(entry: catalogue.Entry) -> Peaks:
    """The peaks of an entry of the catalogue; its copies are taken to be as fast as its reads."""
    return Peaks(entry.bandwidth, entry.bandwidth, dict(entry.rates), source="datasheet", fingerprint=entry.name)


def cache_path() -> Path:
    """Where measured peaks are kept: $XDG_CACHE_HOME/titaninfer/peaks.json, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "titaninfer" / "peaks.json"


def _read_cache() -> dict[str, Peaks]:
    try:
        entries = json.loads(cache_path().read_text(encoding="utf-8"))
        peaks = {fingerprint: Peaks(**entry) for fingerprint, entry in entries.items()}
        return {fingerprint: p for fingerprint, p in peaks.items() if _plausible(p)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _plausible(peaks: Peaks) -> bool:
    rates = (peaks.read_bandwidth, peaks.copy_bandwidth, *peaks.matmul.values())
    return all(isinstance(rate, int | float) and rate > 0 for rate in rates) and bool(peaks.matmul)


def _write_cache(peaks: dict[str, Peaks]) -> None:
    entries = {fingerprint: asdict(p) for fingerprint, p in peaks.items()}
    try:
        write_atomically(cache_path(), json.dumps(entries, indent=2, sort_keys=True) + "\n")
    except OSError:
        return  # a read-only home is no reason to fail: the next run measures again
