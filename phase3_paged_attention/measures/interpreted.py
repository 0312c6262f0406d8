"""Run a module in Triton's interpreter, which must be chosen before Triton is imported: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from module0_profiling import rooms
from module0_profiling.course.errors import CourseError, blame
from module0_profiling.course.parts import Use, framework_of, package_of, workspace_of

ROOM = __name__.partition(".")[0]
SECONDS = 300


def in_process(module: str, *arguments: str, interpret: bool = True) -> dict[str, Any]:
    """The JSON object that `python -m module arguments` prints last.

    Args:
        module: one that ends in `answer`.
        arguments: of its command line.
        interpret: whether Triton interprets there; else it compiles, also where this process interprets.

    Raises:
        CourseError: it failed; one line that says where.
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
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"{module} ended with status {done.returncode}"]
        raise CourseError(said[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def answer(questions: Mapping[str, Callable[[Use], dict[str, Any]]], arguments: list[str]) -> None:
    """Print what the question says that the first argument names, of the implementations that the second names."""
    name, use = arguments
    try:
        found = questions[name](Use.parse(use))
    except CourseError as error:  # it says where
        sys.exit(str(error))
    except Exception as error:
        homes = (workspace_of(ROOM), framework_of(ROOM), package_of(ROOM))
        sys.exit(blame(error, homes, rooms.ROOT))
    print(json.dumps(found))
