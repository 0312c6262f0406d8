"""Planted bugs: graders are proven by small mutations of the solution, each of which a named test must catch.

    [[bug]]
    file = "kv_cache.py"                                     # relative to the room
    find = "self.length += 1"                                # occurs exactly once
    replace = "self.length += 2"
    caught_by = "phase0_prototype/tests/test_kv_cache.py"    # a pytest node, or the id of a gate
    why = "the cache grows by one token for each token fed"

Each bug is planted in a temporary copy of the rooms. Before any is planted, all the named tests must pass there: a
test that always fails catches nothing. A bug that keeps a file from importing does not count either: it is no subtle
bug.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from module0_profiling import rooms
from module0_profiling.course import gates, nodes
from module0_profiling.course.errors import CourseError
from module0_profiling.course.parts import Use, framework_of
from module0_profiling.course.rows import rows

BIG = 1 << 20  # bytes; bigger files (weights) are linked, not copied
LEFT_OUT = ("__pycache__", "notebooks", ".ipynb_checkpoints", ".hypothesis")


@dataclass(frozen=True)
class Bug:
    """A mutation, and who must notice it; the module's text says what each key means."""

    file: str
    find: str
    replace: str
    caught_by: str
    why: str

    def __post_init__(self) -> None:
        if not self.find or self.find == self.replace:
            raise CourseError("find must be some text, and replace another")


@dataclass(frozen=True)
class Verdict:
    """Whether a bug was caught, and what the test said, or why it was not."""

    bug: Bug
    caught: bool
    detail: str


def load(phase: str, root: Path | None = None) -> list[Bug]:
    """The bugs of a phase.

    Raises:
        CourseError: a bad row, a file that is missing, or a text that does not occur exactly once in it.
    """
    package = (root or rooms.ROOT) / rooms.room(phase, root)
    file = package / "planted.toml"
    bugs = rows(file, "bug", Bug)
    for index, bug in enumerate(bugs, start=1):
        target = package / bug.file
        if not target.is_file():
            raise CourseError(f"{file}: bug {index}: {bug.file} does not exist")
        count = target.read_text(encoding="utf-8").count(bug.find)
        if count != 1:
            raise CourseError(
                f"{file}: bug {index}: {bug.find!r} occurs {count} times in {bug.file}, it must occur once"
            )
    return bugs


def hunt(
    phase: str, root: Path | None = None, *, only: Sequence[int] = (), workers: int = 2, timeout: float = 120
) -> list[Verdict]:
    """Plant each bug in turn and run the test that must catch it.

    Args:
        only: numbers of bugs, from 1; empty means all.
        workers: tests that run at the same time, each in a copy of its own.
        timeout: seconds for one test; a test that hangs has noticed the bug, and the detail says so.

    Raises:
        CourseError: a named test does not pass without a bug.
    """
    base = root or rooms.ROOT
    room = rooms.room(phase, base)
    bugs = [bug for index, bug in enumerate(load(phase, base), start=1) if not only or index in only]
    if not bugs:
        return []
    with ExitStack() as stack:
        trees: SimpleQueue[Path] = SimpleQueue()
        for _ in range(min(workers, len(bugs))):
            trees.put(_copy(base, room, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="planted-")))))
        tree = trees.get()
        _require_green(room, tree, bugs, max(timeout, 60) * len(bugs))
        trees.put(tree)

        def one(bug: Bug) -> Verdict:
            tree = trees.get()
            try:
                return _plant(room, tree, bug, timeout)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, bugs))


def _plant(room: str, tree: Path, bug: Bug, timeout: float) -> Verdict:
    target = tree / room / bug.file
    original = target.read_text(encoding="utf-8")
    target.write_text(original.replace(bug.find, bug.replace), encoding="utf-8")
    try:
        if _is_gate(room, tree, bug.caught_by):
            return _ask_gate(room, tree, bug, timeout)
        run = nodes.run((bug.caught_by,), use=_use(room, tree), root=tree, timeout=timeout, stop_at_first=True)
    finally:
        target.write_text(original, encoding="utf-8")
    if run.broken.startswith("no answer"):
        return Verdict(bug, True, f"the test hung: {run.broken}")
    if run.broken:
        return Verdict(bug, False, f"the bug breaks the run instead of a test: {run.broken}")
    return Verdict(bug, run.failed > 0, run.first if run.failed else f"{run.passed} passed, {run.skipped} skipped")


def _ask_gate(room: str, tree: Path, bug: Bug, timeout: float) -> Verdict:
    try:
        status, said = _grade(room, tree, bug.caught_by, timeout)
    except subprocess.TimeoutExpired:
        return Verdict(bug, True, f"the gate hung: no answer within {timeout:.0f} s")
    return Verdict(bug, status == 1 and said.startswith("failed"), said)


def _require_green(room: str, tree: Path, bugs: Sequence[Bug], timeout: float) -> None:
    named = sorted({bug.caught_by for bug in bugs})
    tests = tuple(name for name in named if not _is_gate(room, tree, name))
    if tests:
        run = nodes.run(tests, use=_use(room, tree), root=tree, timeout=timeout)
        if run.broken or run.failed:
            raise CourseError(f"{rooms.phase(room)}: a test fails with no bug planted: {run.broken or run.first}")
    for name in named:
        if _is_gate(room, tree, name):
            status, said = _grade(room, tree, name, timeout)
            if status != 0:
                raise CourseError(f"{rooms.phase(room)}: gate {name} does not pass with no bug planted: {said}")


def _grade(room: str, tree: Path, gate: str, timeout: float) -> tuple[int, str]:
    command = [sys.executable, "-m", "module0_profiling.course", str(tree), room, gate]
    environment = nodes.environment(_use(room, tree), tree)
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout)
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    return done.returncode, lines[-1]


def _is_gate(room: str, tree: Path, name: str) -> bool:
    return any(gate.id == name for gate in gates.load(room, tree))


def _use(room: str, tree: Path) -> str:
    return str(Use.parse(f"{room}=solution", tree).complete(tree))


def _copy(base: Path, room: str, folder: Path) -> Path:
    """The rooms up to `room`, and the files beside them, without what tests do not need."""
    order = rooms.discover(base)
    for name in order[: order.index(room) + 1]:
        shutil.copytree(
            base / name, folder / name, ignore=shutil.ignore_patterns(*LEFT_OUT), copy_function=_copy_or_link
        )
    for name in ("pyproject.toml", "conftest.py", "pytest.ini"):
        if (base / name).is_file():
            shutil.copy2(base / name, folder / name)
    assert framework_of(room, folder).is_dir()
    return folder


def _copy_or_link(source: str, target: str) -> str:
    if Path(source).stat().st_size > BIG:
        Path(target).symlink_to(Path(source).resolve())
        return target
    return str(shutil.copy2(source, target))
