"""Reads a trace of any kind: the file's first bytes say which, not its name."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

from module0_profiling.traces import chrome, nsys
from module0_profiling.traces.tables import Trace, TraceError

SQLITE = b"SQLite format 3\x00"
GZIP = b"\x1f\x8b"


def read(path: str | Path) -> Trace:
    """Read a Chrome trace (.json, .json.gz) of torch.profiler or an SQLite export of Nsight Systems.

    A trace that was cut off is read as far as it goes; `Trace.warnings` says so.

    Raises:
        TraceError: there is no such file, it is something else, or it holds no events.
    """
    path = Path(path)
    if importlib.util.find_spec("pandas") is None:
        raise TraceError("traces are read into pandas tables and pandas is not installed: pip install pandas")
    try:
        with path.open("rb") as file:
            head = file.read(len(SQLITE))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}: give a .json, .json.gz or .sqlite file") from None
    if not head:
        raise TraceError(f"{path} is empty: the profiler was stopped before it wrote; record it again")
    if head == SQLITE:
        return nsys.read(path)
    if head[:2] == GZIP:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as text:
            return chrome.read(text, path)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"["):
        remedy = "nsys export --type sqlite FILE" if path.suffix in (".nsys-rep", ".qdrep") else "titan trace --help"
        raise TraceError(f"{path} is neither a Chrome trace (JSON) nor an SQLite export of nsys: see {remedy}")
    with path.open(encoding="utf-8-sig", errors="replace") as text:
        return chrome.read(text, path)
