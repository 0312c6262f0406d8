"""What a step of this engine costs beside its operations: measured as phase 0 does, on this phase's engine."""

from __future__ import annotations

from module0_profiling.calibration import Calibration
from module0_profiling.device import Device
from module0_profiling.engine_overhead import Overhead
from phase0_prototype import overhead
from phase4_scheduler.llm import LLM


def measure(device: Device, rates: Calibration) -> Overhead:
    """Overhead of a decode step with the runner that the engine chooses here; takes about 2 s on a CPU."""
    return overhead.measure(device, rates, LLM)
