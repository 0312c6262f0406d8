"""Timelines of any profiler, read into the same tables: torch.profiler's Chrome traces and Nsight Systems' exports.

from module0_profiling import traces
trace = traces.read("decode.json.gz")
traces.by_time(trace.kernels), traces.busy(trace), traces.idle_by_cause(trace)
"""

from module0_profiling.traces.analysis import (
    Busy,
    busy,
    by_time,
    gaps,
    idle_by_cause,
    launch_overhead,
    memcpy_by_kind,
    self_times,
    worked,
)
from module0_profiling.traces.reading import read
from module0_profiling.traces.tables import Trace, TraceError

__all__ = ["Busy", "Trace", "TraceError", "busy", "by_time", "gaps", "idle_by_cause", "launch_overhead"]
__all__ += ["memcpy_by_kind", "read", "self_times", "worked"]
