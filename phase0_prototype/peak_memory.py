"""How much memory loading a checkpoint takes at its peak, measured from inside a process that does nothing else."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")


def load_growth(model: str, small: str, use: str) -> int:
    """Bytes by which the resident memory grew, at its peak, while an engine in float32 was built on the CPU.

    Args:
        model: directory of the checkpoint.
        small: a small checkpoint, loaded first so that imports are not counted.
        use: whose parts, as `Use.parse` reads it.
    """
    from phase0_prototype.llm import LLM

    def load(path: str) -> None:
        LLM(path, dtype="float32", device="cpu", max_model_len=64, max_num_seqs=1, use=use)

    load(small)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the imports
    before = psutil.Process().memory_info().rss
    load(model)
    return peak() - before


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
