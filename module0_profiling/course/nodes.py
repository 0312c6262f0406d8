"""Run a pytest node in its own process and read what became of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from module0_profiling import rooms


@dataclass(frozen=True)
class Run:
    """The tests of a run.

    Attributes:
        passed, failed, skipped: counts of tests.
        broken: why the run itself failed (no such test, a file that does not import, a time-out); empty otherwise.
        asserted: every failure was an assertion, not some other exception.
        first: the first failure, `test_name: message`.
        why_skipped: reason of the first skipped test.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    broken: str = ""
    asserted: bool = True
    first: str = ""
    why_skipped: str = ""


def run(
    nodes: tuple[str, ...], *, use: str, root: Path, timeout: float | None = None, stop_at_first: bool = False
) -> Run:
    """Run pytest on nodes from `root`, with `IMPL` set.

    Args:
        nodes: paths relative to root, each with `::test` or not.
        use: value of `IMPL`, a complete Use as text.
        timeout: seconds; None waits for ever (a learner presses Ctrl-C).
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-p", "no:hypothesispytest"]  # a second to import, and only adds options: hypothesis works without
        if stop_at_first and find_spec("hypothesis"):
            command += ["-p", "module0_profiling.course.no_shrink"]
        command += ["-x"] * stop_at_first + list(nodes)
        try:
            done = subprocess.run(
                command, cwd=root, env=environment(use, root), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return Run(broken=f"no answer within {timeout:.0f} s")
        if not report.is_file():
            output = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            return Run(broken=f"pytest stopped with status {done.returncode}: {output[-1]}")
        return _read(report, done.returncode)


def environment(use: str, root: Path) -> Mapping[str, str]:
    """Variables for a process that grades under `root`, which comes first on its path."""
    paths = [str(root)]
    if not (root / "module0_profiling").is_dir():
        paths.append(str(rooms.ROOT))
    paths += filter(None, [os.environ.get("PYTHONPATH", "")])
    # No bytecode: a file that is changed twice within a second could be taken for its old self.
    return os.environ | {"IMPL": use, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def _read(report: Path, status: int) -> Run:
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [(case, failure) for case in cases if (failure := case.find("failure")) is not None]
    errors = [(case, error) for case in cases if (error := case.find("error")) is not None]
    skips = [skip for case in cases if (skip := case.find("skipped")) is not None]
    broken = ""
    if status not in (0, 1):
        broken = (
            f"{errors[0][0].get('name')} does not import: {_last_error(errors)}" if errors else "it was interrupted"
        )
        broken = broken if cases else "no such test"
    first = next((f"{case.get('name')}: {_message(found)}" for case, found in failures + errors), "")
    return Run(
        passed=len(cases) - len({id(case) for case, _ in failures + errors}) - len(skips),
        failed=len({id(case) for case, _ in failures + errors}),
        skipped=len(skips),
        broken=broken,
        asserted=not errors
        and all(_message(found).startswith(("Assert", "assert", "Failed")) for _, found in failures),
        first=first,
        why_skipped=_message(skips[0]) if skips else "",
    )


def _message(found: ElementTree.Element) -> str:
    lines = (found.get("message") or found.text or "").strip().splitlines()
    return lines[0] if lines else "no message"


def _last_error(errors: list[tuple[ElementTree.Element, ElementTree.Element]]) -> str:
    lines = [line for _, error in errors for line in (error.text or "").splitlines() if line.startswith("E ")]
    return lines[-1].removeprefix("E").strip() if lines else "see pytest"
