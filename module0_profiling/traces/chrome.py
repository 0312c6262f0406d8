"""Chrome traces of torch.profiler (`export_chrome_trace`): JSON, one object an event, times in microseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from module0_profiling.traces.json_stream import JsonStream, JsonStreamError
from module0_profiling.traces.tables import Trace, TraceBuilder, TraceError

# "cat" of torch.profiler's events -> table; older versions of torch capitalise some.
TABLE_OF = {
    "kernel": "kernels",
    "gpu_memcpy": "memcpy",
    "gpu_memset": "memcpy",
    "cuda_runtime": "launches",
    "cuda_driver": "launches",
    "cpu_op": "cpu_ops",
    "operator": "cpu_ops",
    "user_annotation": "ranges",
}
NOT_OURS = ("ProfilerStep", "PyTorch Profiler")  # ranges of the profiler itself


def read(text: TextIO, path: Path) -> Trace:
    """Read a trace from an open file; events of other kinds (Python frames, flow arrows, metadata) are passed over.

    Raises:
        TraceError: it is no Chrome trace, or holds nothing that the tables can hold.
    """
    builder, warnings, damaged, count = TraceBuilder(), [], 0, 0
    events = _events(JsonStream(text))
    try:
        for event in events:
            count += 1
            try:
                _add(builder, event)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                damaged += 1
    except JsonStreamError as error:
        if not count:
            raise TraceError(f"{path} is no Chrome trace ({error}): record one with torch.profiler") from None
        warnings.append(f"{path} is damaged after {count:,} events ({error}): what came before was read")
    if damaged:
        warnings.append(f"{damaged:,} events without a name or time were left out")
    if not count:
        raise TraceError(f"{path} holds no traceEvents: record it with torch.profiler's export_chrome_trace")
    return builder.build("torch.profiler", path, 1e-6, tuple(warnings))


def _events(stream: JsonStream) -> Iterator[Any]:
    """The events of both forms of the format: a bare array, or an object with `traceEvents` among other keys."""
    if stream.peek() == "[":
        yield from stream.array()
        return
    stream.take("{")
    while stream.peek() != "}":
        key = stream.value()
        stream.take(":")
        if key == "traceEvents" and stream.peek() == "[":
            yield from stream.array()
        else:
            stream.value()
        if stream.peek() == ",":
            stream.take(",")
        elif stream.peek() != "}":
            stream.take("}")


def _add(builder: TraceBuilder, event: dict[str, Any]) -> None:
    if event["ph"] != "X":
        return
    table = TABLE_OF.get(str(event.get("cat", "")).lower())
    name = event["name"]
    if table is None or name.startswith(NOT_OURS):
        return
    args = event.get("args") or {}
    if table in ("kernels", "memcpy"):
        more = [_number(args.get("stream", event.get("tid"))), _number(args.get("correlation"))]
        more += [max(0, _number(args.get("bytes")))] if table == "memcpy" else []
    else:
        more = [_number(event.get("tid"))]
        more += [_number(args.get("correlation"))] if table == "launches" else []
    builder.add(table, name, event["ts"], event["dur"], *more)


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return -1
