"""Run everything that needs a GPU, most valuable first, within a budget: `python -m module0_profiling.bench_gpu`.

A room's `benchmark.py` lists what it checks and what it measures on a GPU:

    GPU_CHECKS = (GpuCase("check_kernels", value=10, seconds=60),)
    GPU_CASES = (GpuCase("kernels", value=9, seconds=90, check="check_kernels"),)

Checks come first: the time of a wrong kernel is worth nothing. Entries run one after the other, each in a process of
its own, so that a crash or a hang costs one entry. What was recorded in this state of the code is not run again: start
the command as often as you get the GPU. GPU time is scarce, and an hour of it must never be lost to a missing script,
so `--dry-run` runs every entry with tiny sizes on the CPU and records nothing.

Only the standard library is imported here, and a room that lacks a package costs its own entries only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.results import commit_of, results_folder

DONE = rooms.ROOT / "build" / "bench-gpu.json"
LOGS = rooms.ROOT / "build" / "bench-gpu-logs"
SOURCES = ("*.py", "*.cu", "*.h", "*.cpp", "*.rs", "*.toml")
DRY_RUN_SECONDS = 300


class CheckFailed(RuntimeError):
    """A GPU computes something wrong; the message is one line that says what, by how much, and what was allowed."""

    is_user_error = True  # a command line prints the message alone


@dataclass(frozen=True)
class GpuCase:
    """One check or benchmark of a room.

    Attributes:
        name: as on the command line of the room's benchmark.
        value: higher runs earlier.
        seconds: what it usually takes; it is not started with less left.
        check: the check of the same room that must have passed before, or "".
    """

    name: str
    value: int
    seconds: float
    check: str = ""


@dataclass(frozen=True)
class Entry:
    """A case with its room; `kind` is "check" or "bench"."""

    room: str
    kind: str
    case: GpuCase

    @property
    def label(self) -> str:
        """What a line of progress calls it."""
        return f"{self.room} {self.case.name}"


def entries(found_rooms: Sequence[str] | None = None) -> tuple[list[Entry], list[str]]:
    """(entries, problems): all checks, then all benchmarks, most valuable first; one line a room that has none to give.

    A room that cannot be imported, for want of a package say, is a problem and not an exception.
    """
    found, problems = [], []
    for room in rooms.discover() if found_rooms is None else found_rooms:
        try:
            if importlib.util.find_spec(f"{room}.benchmark") is None:
                continue
            module = importlib.import_module(f"{room}.benchmark")
        except ModuleNotFoundError as error:
            problems.append(f"{room}: {error}; pip install {error.name}")
            continue
        except Exception as error:  # a broken room must not cost the others their time on the GPU
            problems.append(f"{room}: {type(error).__name__}: {_first_line(error)}")
            continue
        found += [Entry(room, "check", case) for case in getattr(module, "GPU_CHECKS", ())]
        found += [Entry(room, "bench", case) for case in getattr(module, "GPU_CASES", ())]
    return sorted(found, key=lambda entry: (entry.kind != "check", -entry.case.value)), problems


def run_suite(
    found: Sequence[Entry],
    budget: float,
    *,
    run: Callable[[Entry, float], int],
    done: Sequence[str] = (),
    keep: Callable[[list[str]], None] = lambda done: None,
    clock: Callable[[], float] = time.monotonic,
    write: Callable[[str], None] = print,
) -> list[str]:
    """Run entries until `budget` seconds are spent; returns the labels of those that failed.

    Args:
        run: runs one entry within so many seconds and returns its exit status.
        done: labels that need not run again.
        keep: is given all labels that are done, after each one.
        clock, write: for tests.
    """
    began, passed, failed = clock(), list(done), []
    for number, entry in enumerate(found, 1):
        spent = clock() - began
        head = f"[{spent:4.0f}/{budget:.0f} s] {number}/{len(found)} {entry.kind} {entry.label}"
        needed = f"{entry.room} {entry.case.check}"
        if entry.label in passed:
            write(f"{head}: done before")
        elif entry.case.check and needed not in passed:
            write(f"{head}: not run, {entry.case.check} {'failed' if needed in failed else 'has not passed yet'}")
        elif budget - spent < entry.case.seconds:
            write(f"{head}: no time left, it needs about {entry.case.seconds:.0f} s")
        else:
            status = run(entry, budget - spent)
            if status == 0:
                passed.append(entry.label)
            else:
                failed.append(entry.label)
            taken = clock() - began - spent
            write(f"{head}: {'ok' if status == 0 else f'FAILED (status {status})'} in {taken:.0f} s")
            keep(passed)
    return failed


def dry_run(subjects: Mapping[str, Callable[[], object]]) -> int:
    """For a room's `benchmark --dry-run`: call each subject, print a line for each, return 1 if any failed."""
    status = 0
    for name, subject in subjects.items():
        began = time.perf_counter()
        try:
            subject()
        except Exception as error:  # the next subject is tried all the same
            status = 1
            print(f"dry run failed: {name}: {type(error).__name__}: {_first_line(error)}", flush=True)
        else:
            print(f"dry run ok: {name} ({time.perf_counter() - began:.1f} s)", flush=True)
    return status


def dry_run_all(
    found: Sequence[Entry], *, timeout: float = DRY_RUN_SECONDS, write: Callable[[str], None] = print
) -> int:
    """Start every entry of every room on the CPU, one process a room; returns 1 unless each of them finished."""
    environment = _environment() | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    failed = []
    for room in dict.fromkeys(entry.room for entry in found):
        names = [entry.case.name for entry in found if entry.room == room]
        command = [sys.executable, "-m", f"{room}.benchmark", *names, "--device", "cpu", "--dry-run"]
        try:
            done = subprocess.run(
                command, cwd=rooms.ROOT, env=environment, capture_output=True, text=True, timeout=timeout
            )
            output, errors = done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            output, errors = _text(error.stdout), f"stopped after {timeout:.0f} s"
        for line in output.splitlines():
            if line.startswith("dry run "):
                write(f"{room} {line}")
        lost = [name for name in names if f"dry run ok: {name} (" not in output]
        failed += [f"{room} {name}" for name in lost]
        if lost and errors.strip():
            write(f"{room}: {errors.strip().splitlines()[-1]}")
    if failed:
        write(f"dry run: {len(failed)} of {len(found)} did not finish: {', '.join(failed)}")
    else:
        write(f"dry run: {len(found)} entries started and finished, nothing was recorded")
    return 1 if failed else 0


def main() -> None:
    """Exit status 1 if an entry failed or a room could not be imported, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--out", type=Path, help="copy results and logs here after every entry")
    parser.add_argument("--list", action="store_true", help="print the order and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="every entry with tiny sizes on the CPU; records nothing"
    )
    args = parser.parse_args()
    found, problems = entries()
    for problem in problems:
        print(f"bench-gpu: {problem}", file=sys.stderr)
    if args.list:
        for entry in found:
            print(f"{entry.case.value:3}  {entry.kind}  {entry.label}  ~{entry.case.seconds:.0f} s")
        sys.exit(1 if problems else 0)
    if args.dry_run:
        sys.exit(1 if dry_run_all(found) or problems else 0)
    if not _cuda():
        print(
            "bench-gpu: torch sees no CUDA device here; nothing was measured (titan doctor says more)", file=sys.stderr
        )
        sys.exit(2)
    state = state_of(rooms.ROOT)

    def keep(done: list[str]) -> None:
        DONE.parent.mkdir(exist_ok=True)
        DONE.write_text(json.dumps({"state": state, "done": done}))
        if args.out:
            for folder, name in ((results_folder(), "results"), (LOGS, "logs")):
                if folder.is_dir():
                    shutil.copytree(folder, args.out / name, dirs_exist_ok=True)

    failed = run_suite(found, args.budget, run=_run_logged, done=_read_done(state), keep=keep, write=_say)
    if failed:
        print(f"bench-gpu: failed: {', '.join(failed)}; logs are in {LOGS}", file=sys.stderr)
    sys.exit(1 if failed or problems else 0)


def state_of(root: Path) -> str:
    """The commit, and for changed code or without git a digest of the sources: what was done there counts as done."""
    commit = commit_of(root)
    if commit != "unknown" and not commit.endswith("-dirty"):
        return commit
    digest = hashlib.sha256()
    for room in rooms.discover(root):
        for path in sorted(path for pattern in SOURCES for path in (root / room).rglob(pattern)):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{commit} {digest.hexdigest()[:16]}"


def _run_logged(entry: Entry, seconds: float) -> int:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{entry.room}-{entry.case.name}.log"
    command = [sys.executable, "-m", f"{entry.room}.benchmark", entry.case.name, "--device", "cuda"]
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, cwd=rooms.ROOT, env=_environment(), stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    if status:
        for line in log.read_text(errors="replace").strip().splitlines()[-5:]:
            _say(f"    {line}")
    return status


def _environment() -> dict[str, str]:
    paths = [str(rooms.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _read_done(state: str) -> list[str]:
    try:
        kept = json.loads(DONE.read_text())
        return [str(label) for label in kept["done"]] if kept["state"] == state else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _say(line: str) -> None:
    print(line, flush=True)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


if __name__ == "__main__":
    main()
