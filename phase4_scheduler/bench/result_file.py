"""The JSON file of a benchmark: what was asked, of what, on which machine, the summary, and every request."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from module0_profiling.device import describe_machine
from module0_profiling.results import REPOSITORY, commit_of, versions_of, write_atomically
from phase0_prototype.errors import UserError

FORMAT = 1
VERSIONED = ("torch", "msgspec", "fastapi", "uvicorn", "uvloop", "httptools", "pyzmq")


def write(path: Path, kind: str, parts: dict[str, Any], began: float) -> Path:
    """Write a result, replacing the file at once.

    Args:
        path: of the file.
        kind: "serve", "throughput" or "latency".
        parts: config, summary, and what else belongs to this kind.
        began: seconds since 1970.

    Raises:
        UserError: the place can't be written to.
    """
    data = {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit_of(REPOSITORY),
        "machine": describe_machine(),
        "versions": versions_of(VERSIONED),
        **parts,
    }
    try:
        write_atomically(path, json.dumps(data, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror or error}; choose another place") from None
    return path
