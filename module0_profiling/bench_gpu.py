"""Run everything that needs a GPU, most valuable first, within a budget: `python -m module0_profiling.bench_gpu`.

A room's `benchmark.py` lists what it measures on a GPU: `GPU_CASES = (GpuCase("engines", value=9, seconds=120),)`.
Cases run one after the other, each in a process of its own, so that a crash or a hang costs one case. A case that was
recorded at this commit is not run again: start the command as often as you get the GPU. GPU time is scarce, and an hour
of it must never be lost to a missing script.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.results import commit_of, results_folder

DONE = rooms.ROOT / "build" / "bench-gpu.json"


@dataclass(frozen=True)
class GpuCase:
    """One case of a room's benchmark.

    Attributes:
        name: as on the benchmark's command line.
        value: higher runs earlier.
        seconds: what it usually takes; it is not started with less left.
    """

    name: str
    value: int
    seconds: float


def cases() -> list[tuple[str, GpuCase]]:
    """All GPU cases of all rooms, most valuable first."""
    found = []
    for room in rooms.discover():
        if importlib.util.find_spec(f"{room}.benchmark"):
            module = importlib.import_module(f"{room}.benchmark")
            found += [(room, case) for case in getattr(module, "GPU_CASES", ())]
    return sorted(found, key=lambda item: -item[1].value)


def main() -> None:
    """Run cases until the budget is spent; exit status 1 if any failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--out", type=Path, help="copy reports/results here after every case")
    parser.add_argument("--list", action="store_true", help="print the order and stop")
    args = parser.parse_args()
    if args.list:
        for room, case in cases():
            print(f"{case.value:3}  {room}  {case.name}  ~{case.seconds:.0f} s")
        return
    import torch

    if not torch.cuda.is_available():
        print(
            "bench-gpu: torch sees no CUDA device here; nothing was measured (titan doctor says more)", file=sys.stderr
        )
        sys.exit(2)
    began, commit = time.monotonic(), commit_of(rooms.ROOT)
    done = _read_done(commit)
    failed = []
    for room, case in cases():
        label, left = f"{room} {case.name}", args.budget - (time.monotonic() - began)
        if label in done:
            print(f"done before    {label}")
            continue
        if left < case.seconds:
            print(f"no time left   {label} (needs ~{case.seconds:.0f} s, {left:.0f} s left)")
            continue
        print(f"running        {label} (~{case.seconds:.0f} s, {left:.0f} s left)", flush=True)
        command = [sys.executable, "-m", f"{room}.benchmark", case.name, "--device", "cuda"]
        try:
            status = subprocess.run(command, cwd=rooms.ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            status = 124
        if status == 0:
            done.append(label)
            DONE.parent.mkdir(exist_ok=True)
            DONE.write_text(json.dumps({"commit": commit, "done": done}))
        else:
            failed.append(label)
            print(f"failed ({status})   {label}", flush=True)
        if args.out:
            shutil.copytree(results_folder(), args.out / "results", dirs_exist_ok=True)
    sys.exit(1 if failed else 0)


def _read_done(commit: str) -> list[str]:
    try:
        state = json.loads(DONE.read_text())
    except (OSError, json.JSONDecodeError):
        return []
    return list(state["done"]) if state.get("commit") == commit else []


if __name__ == "__main__":
    main()
