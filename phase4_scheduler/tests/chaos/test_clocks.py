"""Clocks that jump (a suspended machine, a daylight-saving bug, NTP) move no deadline: only monotonic ones are read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parents[2]
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now", "time.localtime"}
TOLD = {  # uses in files where the time of day is what somebody wants to know, and nothing waits for it
    "server/service.py": 1,  # `created` of the models
    "server/generate_routes.py": 2,  # and of an answer
    "server/chat_template.py": 1,  # strftime_now of templates
    "server/serve.py": 1,  # when this process was started, where the system tells it so
    "framework/server/front.py": 2,  # `created` and an id
    "bench/client.py": 1,  # Retry-After as a date
    "bench/load.py": 1,  # when it was measured
    "bench/offline_commands.py": 2,  # the same
}


def wall_clocks(source: str) -> list[str]:
    """Calls and mentions of the time of day."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL:
            found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"time.{name.name}" for name in node.names if f"time.{name.name}" in WALL]
    return found


def test_no_file_waits_by_the_time_of_day() -> None:
    files = [p for p in ROOM.rglob("*.py") if not {"tests", "notebooks", "measures"} & set(p.relative_to(ROOM).parts)]
    assert len(files) > 60
    found = {str(path.relative_to(ROOM)): len(wall_clocks(path.read_text())) for path in files}
    assert {name: count for name, count in found.items() if count > TOLD.get(name, 0)} == {}


@pytest.mark.parametrize("source", ["time.time()", "from time import time", "f(clock=time.time)", "datetime.now()"])
def test_the_lint_finds_each_kind(source: str) -> None:
    assert wall_clocks(source)


def test_the_lint_lets_monotonic_clocks_pass() -> None:
    assert not wall_clocks("time.monotonic(), time.perf_counter(), loop.time()")
