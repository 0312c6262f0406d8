"""Figures that a process of its own takes: Triton decides at its import whether it interprets, and compilers crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict

from module0_profiling import rooms
from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.gpu_tools import MissingTool
from module0_profiling.results import Figure

SECONDS = 900


def figures(module: str, *arguments: str, interpret: bool = False) -> list[Figure]:
    """The figures that `python -m module arguments` says, a module that ends in `say`.

    Args:
        module: dotted name.
        arguments: of its command line.
        interpret: whether Triton interprets there; else it compiles, also where this process interprets.

    Raises:
        CheckFailed: it failed; the last line that it wrote.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=rooms.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckFailed(f"{module} {' '.join(arguments)}: {said[-1]}")
    return [Figure(**figure) for figure in json.loads(done.stdout.splitlines()[-1])]


def say(take: Callable[[], Iterable[Figure]]) -> None:
    """Print what is taken, for `figures` to read; a missing tool is one line and status 1."""
    try:
        taken = take()
    except MissingTool as error:
        sys.exit(str(error))
    print(json.dumps([asdict(figure) for figure in taken]))
