"""Questions to a trace: what took the time, how busy was the processor, what happened while it was not.

A trace without kernels is one of a CPU: there operators do the work of kernels. What an operator takes is its self
time, without the operators that it calls. Its innermost calls alone would not do: a matrix product of oneDNN calls
`aten::empty` for its output and then works itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from module0_profiling.traces.tables import Trace

if TYPE_CHECKING:
    from pandas import DataFrame

NOBODY = "(no operator or range)"


@dataclass(frozen=True)
class Busy:
    """Seconds of a trace: all of it, those with at least one kernel (on a CPU: operator) running, and the rest."""

    wall: float
    busy: float

    @property
    def idle(self) -> float:
        """Seconds in which nothing ran."""
        return self.wall - self.busy

    @property
    def share(self) -> float:
        """busy / wall, 0..1."""
        return self.busy / self.wall if self.wall else 0.0


def worked(trace: Trace) -> DataFrame:
    """What kept the processor busy, name, start and duration: kernels and copies; on a CPU operators, which nest."""
    import pandas as pd

    columns = ["name", "start", "duration"]
    if len(trace.kernels) or len(trace.memcpy):
        return pd.concat([trace.kernels[columns], trace.memcpy[columns]], ignore_index=True)
    return trace.cpu_ops[columns]


def self_times(trace: Trace) -> DataFrame:
    """The operators with `duration` reduced to what each took itself, without the operators that it called."""
    ops = trace.cpu_ops.sort_values(["thread", "start", "duration"], ascending=[True, True, False], kind="stable")
    ends = (ops["start"] + ops["duration"]).to_numpy()
    own = ops["duration"].to_numpy(copy=True)
    callers: list[int] = []  # rows of the operators that are open, the innermost last
    thread = None
    for row, (its_thread, start) in enumerate(zip(ops["thread"].tolist(), ops["start"].tolist(), strict=True)):
        if its_thread != thread:
            thread, callers = its_thread, []
        while callers and ends[callers[-1]] <= start:
            callers.pop()
        if callers:
            own[callers[-1]] -= ends[row] - start
        callers.append(row)
    return ops.assign(duration=own.clip(min=0.0)).sort_values("start", kind="stable", ignore_index=True)


def by_time(table: DataFrame, top: int | None = 10) -> DataFrame:
    """The names that took the most time.

    Returns:
        name, calls, total and mean in seconds, share of the table's total; the slowest first, at most `top` rows.
    """
    grouped = table.groupby("name", observed=True)["duration"].agg(calls="count", total="sum", mean="mean")
    grouped["share"] = grouped["total"] / max(grouped["total"].sum(), 1e-300)
    found = grouped.sort_values("total", ascending=False, kind="stable").reset_index()
    return found if top is None else found.head(top)


def busy(trace: Trace) -> Busy:
    """How much of the trace's window had work on the processor; kernels that overlap count once."""
    first, last = trace.window
    return Busy(last - first, float(sum(end - start for start, end in _merged(worked(trace)))))


def gaps(trace: Trace, top: int | None = 10) -> DataFrame:
    """The longest stretches in which nothing ran, and what the CPU did in them.

    Returns:
        start, duration in seconds and `doing`: the innermost operator, runtime call or range that filled most of it.
        The longest first, at most `top` rows (None: all).
    """
    import pandas as pd

    idle = sorted(_idle(trace), key=lambda gap: gap[0] - gap[1])[:top]
    causes = _Causes(trace)
    rows = []
    for start, end in idle:
        during = causes.during(start, end)
        rows.append((start, end - start, max(during, key=lambda name: during[name])))
    return pd.DataFrame(rows, columns=["start", "duration", "doing"])


def idle_by_cause(trace: Trace, top: int | None = 10) -> DataFrame:
    """All idle time by what the CPU did meanwhile.

    Returns:
        doing, gaps (how many it has a part in), total in seconds, share of the idle time; the largest first. The totals
        of all rows are the idle time of `busy`.
    """
    import pandas as pd

    causes = _Causes(trace)
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for start, end in _idle(trace):
        for name, seconds in causes.during(start, end).items():
            totals[name] = totals.get(name, 0.0) + seconds
            counts[name] = counts.get(name, 0) + 1
    idle = sum(totals.values()) or 1.0
    rows = [(name, counts[name], seconds, seconds / idle) for name, seconds in totals.items()]
    rows.sort(key=lambda row: -row[2])
    return pd.DataFrame(rows[:top], columns=["doing", "gaps", "total", "share"])


def launch_overhead(trace: Trace) -> DataFrame:
    """What each kernel's launch cost.

    Returns:
        name of the kernel, call (seconds of the runtime call on the CPU), delay (from the call's end to the kernel's
        start, 0 when the kernel began within it) and duration. Kernels without a recorded launch are left out; those of
        one CUDA graph share a launch.
    """
    launches = trace.launches[trace.launches["correlation"] >= 0].drop_duplicates("correlation", keep="last")
    launches = launches.rename(columns={"start": "called", "duration": "call"})[["called", "call", "correlation"]]
    joined = trace.kernels.merge(launches, on="correlation", how="inner")
    joined["delay"] = (joined["start"] - joined["called"] - joined["call"]).clip(lower=0.0)
    return joined[["name", "call", "delay", "duration"]]


def memcpy_by_kind(trace: Trace) -> DataFrame:
    """Copies and fills: name, calls, bytes, total in seconds, rate in bytes/s; the longest first."""
    grouped = trace.memcpy.groupby("name", observed=True).agg(
        calls=("duration", "count"), bytes=("bytes", "sum"), total=("duration", "sum")
    )
    grouped["rate"] = (grouped["bytes"] / grouped["total"]).where(grouped["total"] > 0, 0.0)
    return grouped.sort_values("total", ascending=False).reset_index()


def _merged(table: DataFrame) -> list[tuple[float, float]]:
    """The union of intervals, in order and disjoint."""
    order = table.sort_values("start", kind="stable")
    found: list[tuple[float, float]] = []
    for start, duration in zip(order["start"].tolist(), order["duration"].tolist(), strict=True):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], start + duration)
        else:
            found.append((start, start + duration))
    return found


def _idle(trace: Trace) -> list[tuple[float, float]]:
    """The window without `worked`."""
    first, last = trace.window
    edges = [first, *(edge for interval in _merged(worked(trace)) for edge in interval), last]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start]


class _Causes:
    """What the busiest thread of the CPU was in at any time: its nested intervals, flattened to the innermost one."""

    def __init__(self, trace: Trace) -> None:
        import pandas as pd

        columns = ["name", "start", "duration", "thread"]
        every = pd.concat([trace.cpu_ops[columns], trace.launches[columns], trace.ranges[columns]], ignore_index=True)
        if len(every):
            every = every[every["thread"] == every["thread"].mode()[0]]
        every = every.sort_values(["start", "duration"], ascending=[True, False], kind="stable")
        self._segments: list[tuple[float, float, str]] = []
        self._flatten(every)
        self._starts = np.array([start for start, _, _ in self._segments])

    def _flatten(self, nested: Any) -> None:
        open_: list[tuple[float, str]] = []  # end and name, the innermost last
        now = 0.0

        def until(time: float) -> None:
            nonlocal now
            while open_ and now < time:
                end, name = open_[-1]
                if min(end, time) > now:
                    self._segments.append((now, min(end, time), name))
                    now = min(end, time)
                if end <= time:
                    open_.pop()
            now = max(now, time)

        rows = zip(nested["name"].tolist(), nested["start"].tolist(), nested["duration"].tolist(), strict=True)
        for name, start, duration in rows:
            until(start)
            while open_ and open_[-1][0] <= start:
                open_.pop()
            open_.append((start + duration, name))
        until(max((end for end, _ in open_), default=0.0))

    def during(self, start: float, end: float) -> dict[str, float]:
        """Seconds of each name within an interval; what nobody fills is NOBODY's."""
        found: dict[str, float] = {}
        rest = end - start
        first = max(0, int(np.searchsorted(self._starts, start, side="right")) - 1)
        last = int(np.searchsorted(self._starts, end, side="left"))
        for begins, ends, name in self._segments[first:last]:
            part = min(ends, end) - max(begins, start)
            if part > 0:
                found[name] = found.get(name, 0.0) + part
                rest -= part
        if rest > 1e-12 or not found:
            found[NOBODY] = rest
        return found
