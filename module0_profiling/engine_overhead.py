"""What a step costs beside its operations: Python, operator calls, sampling, text. The newest engine measures its own.

A room that has an engine has `overhead.py` with `measure(device, rates) -> Overhead`. It is found by looking, as the
rooms are: module 0 imports no phase. What was measured is kept in overhead.json beside the peaks.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass

from module0_profiling import rooms
from module0_profiling.calibration import Calibration
from module0_profiling.device import Device
from module0_profiling.hardware import cache_path
from module0_profiling.results import write_atomically
from module0_profiling.timing import Crowd


@dataclass(frozen=True)
class Overhead:
    """Seconds of a step for each layer, once, and for each sequence. A replayed step has next to none in `layer`."""

    layer: float = 0.0
    step: float = 0.0
    sequence: float = 0.0

    def of(self, layers: int, sequences: int) -> float:
        """In a whole step."""
        return self.layer * layers + self.step + self.sequence * sequences


def measured_overhead(device: Device, rates: Calibration, *, refresh: bool = False) -> tuple[Overhead, str]:
    """The overhead of the newest engine, and the room that it is of; nothing and "" where no room has one.

    Measured once for each device, dtype and number of threads; a bad cache costs a new measurement. What was measured
    on a CPU that others used is returned and not kept.
    """
    room = newest_engine()
    if not room:
        return Overhead(), ""
    key = f"{room}, {device.fingerprint}, {rates.dtype}, {rates.threads} threads"
    entries = _read()
    if not refresh and key in entries:
        return entries[key], room
    crowd = Crowd()
    found: Overhead = importlib.import_module(f"{room}.overhead").measure(device, rates)
    if device.kind != "cpu" or not crowd.crowded:
        _write({**entries, key: found})
    return found, room


def newest_engine() -> str:
    """The last room that measures its overhead, or ""."""
    having = [room for room in rooms.discover() if (rooms.ROOT / room / "overhead.py").is_file()]
    return having[-1] if having else ""


def _read() -> dict[str, Overhead]:
    try:
        entries = json.loads(cache_path().with_name("overhead.json").read_text(encoding="utf-8"))
        found = {
            key: Overhead(**{name: float(value) for name, value in entry.items()}) for key, entry in entries.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {key: entry for key, entry in found.items() if min(asdict(entry).values()) >= 0}


def _write(entries: dict[str, Overhead]) -> None:
    try:
        text = json.dumps({key: asdict(entry) for key, entry in entries.items()}, indent=2, sort_keys=True)
        write_atomically(cache_path().with_name("overhead.json"), text + "\n")
    except OSError:
        return  # a read-only home is no reason to fail: the next run measures again
