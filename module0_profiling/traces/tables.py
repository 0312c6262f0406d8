"""The tables of a trace, whichever profiler wrote it.

Times are seconds since the first event of the trace. Every table has `name`, `start` and `duration`; further columns:

    kernels    stream, correlation      what ran on the GPU
    memcpy     stream, correlation, bytes    copies and fills by the GPU
    launches   thread, correlation      calls of the CUDA runtime and driver on the CPU
    cpu_ops    thread                   torch operators
    ranges     thread                   named ranges: NVTX, record_function

A kernel and the call that launched it share their `correlation`; -1 means that there is none.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = {
    "kernels": ("stream", "correlation"),
    "memcpy": ("stream", "correlation", "bytes"),
    "launches": ("thread", "correlation"),
    "cpu_ops": ("thread",),
    "ranges": ("thread",),
}


class TraceError(ValueError):
    """A file that is no trace, or one that holds nothing: one line that names it and says what to do."""

    is_user_error = True  # the command line prints it as one line


@dataclass(frozen=True)
class Trace:
    """One recorded timeline. The columns of the tables are explained at the top of this file.

    Attributes:
        source: "torch.profiler" or "nsys".
        path: the file it was read from.
        warnings: what was missing or damaged, one line each; empty for a whole trace.
    """

    kernels: DataFrame
    memcpy: DataFrame
    launches: DataFrame
    cpu_ops: DataFrame
    ranges: DataFrame
    source: str
    path: Path
    warnings: tuple[str, ...] = ()

    def tables(self) -> dict[str, DataFrame]:
        """The tables by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def window(self) -> tuple[float, float]:
        """Start of the first event and end of the last, in seconds."""
        filled = [table for table in self.tables().values() if len(table)]
        ends = [(table["start"] + table["duration"]).max() for table in filled]
        return float(min(table["start"].min() for table in filled)), float(max(ends))


@dataclass
class _Columns:
    """One table while it is read: names as numbers and machine numbers, some 50 bytes an event instead of 500."""

    extra: tuple[str, ...]
    names: array[int] = field(default_factory=lambda: array("l"))
    starts: array[float] = field(default_factory=lambda: array("d"))
    durations: array[float] = field(default_factory=lambda: array("d"))
    more: array[int] = field(default_factory=lambda: array("q"))


class TraceBuilder:
    """Collects events and makes a `Trace` of them."""

    def __init__(self) -> None:
        self._columns = {name: _Columns(extra) for name, extra in COLUMNS.items()}
        self._names: dict[str, int] = {}

    def add(self, table: str, name: str, start: float, duration: float, *more: int) -> None:
        """One event of a table; `more` are its further columns, in their order.

        Raises:
            ValueError: the times are no numbers or run backwards.
        """
        columns, start, duration = self._columns[table], float(start), float(duration)
        if not (duration >= 0 and start - start == 0 and duration - duration == 0):
            raise ValueError(f"event {name!r} has start {start} and duration {duration}")
        values = array("q", more)  # before anything is appended: columns stay equally long when this raises
        columns.names.append(self._names.setdefault(name, len(self._names)))
        columns.starts.append(start)
        columns.durations.append(duration)
        columns.more.extend(values)

    def build(self, source: str, path: Path, scale: float, warnings: tuple[str, ...]) -> Trace:
        """The trace.

        Args:
            scale: seconds of one unit of the times that were added.

        Raises:
            TraceError: nothing was added.
        """
        import numpy as np
        import pandas as pd

        filled = [c for c in self._columns.values() if c.starts]
        if not filled:
            why = f" ({warnings[0]})" if warnings else ""
            raise TraceError(f"{path} holds no operators, kernels or ranges{why}: record it again")
        origin = min(min(c.starts) for c in filled)
        labels = list(self._names)
        tables = {}
        for name, c in self._columns.items():
            more = np.frombuffer(c.more, dtype=np.int64) if c.more else np.empty(0, dtype=np.int64)
            tables[name] = pd.DataFrame(
                {
                    "name": pd.Categorical.from_codes(np.asarray(c.names, dtype=np.int64), categories=labels),
                    "start": (np.asarray(c.starts) - origin) * scale,
                    "duration": np.asarray(c.durations) * scale,
                    **dict(zip(c.extra, more.reshape(-1, len(c.extra)).T, strict=True)),
                }
            ).sort_values("start", kind="stable", ignore_index=True)
        return Trace(**tables, source=source, path=path, warnings=warnings)
