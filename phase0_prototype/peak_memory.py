"""How much memory loading a checkpoint takes at its peak, measured by a process that does nothing else.

`python -m phase0_prototype.peak_memory MODEL SMALL USE` prints `load_growth` of them; `in_own_process` runs that.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil

from module0_profiling import rooms
from module0_profiling.course.errors import CourseError

STATUS = Path("/proc/self/status")


def in_own_process(model: Path, small: Path, use: str) -> int:
    """`load_growth` in a new process.

    Raises:
        CourseError: the last line of what went wrong there.
    """
    command = [sys.executable, "-m", "phase0_prototype.peak_memory", str(model), str(small), use]
    done = subprocess.run(command, cwd=rooms.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise CourseError(f"loading failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def load_growth(model: str, small: str, use: str) -> int:
    """Bytes by which the resident memory grew, at its peak, while an engine in bfloat16 was built on the CPU.

    Args:
        model: directory of the checkpoint.
        small: a small checkpoint, loaded first so that imports are not counted.
        use: whose parts, as `Use.parse` reads it.
    """
    from phase0_prototype.llm import LLM

    def load(path: str) -> None:
        LLM(path, dtype="bfloat16", device="cpu", max_model_len=64, max_num_seqs=1, use=use)

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


if __name__ == "__main__":
    print(load_growth(*sys.argv[1:4]))
