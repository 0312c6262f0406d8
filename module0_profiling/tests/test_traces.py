"""Two formats become the same tables; damaged files are one line or a partial table."""

from __future__ import annotations

import gzip
import io
import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from module0_profiling import traces
from module0_profiling.cli import make_app
from module0_profiling.traces import json_stream
from module0_profiling.traces.json_stream import JsonStream, JsonStreamError
from module0_profiling.traces.tables import COLUMNS, TraceError

EXAMPLE = Path(__file__).parent.parent / "examples" / "decode_cpu.trace.json.gz"


# One timeline, told by both profilers: microseconds, thread 7, stream 3.
#
#   CPU   forward 0..100 [ aten::mm 10..30 [ cudaLaunchKernel 15..20 ]   aten::add 40..60 [ cudaLaunchKernel 45..50 ] ]
#   GPU              gemm 25..55                 add 70..80          memcpy 90..95


def event(cat: str, name: str, start: float, end: float, **args: object) -> dict[str, object]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": 1e6 + start,
        "dur": end - start,
        "tid": 7,
        "pid": 1,
        "args": args,
    }


EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
    event("user_annotation", "forward", 0, 100),
    event("user_annotation", "ProfilerStep#1", -500, 900),
    event("cpu_op", "aten::mm", 10, 30),
    event("cpu_op", "aten::add", 40, 60),
    event("cuda_runtime", "cudaLaunchKernel", 15, 20, correlation=1),
    event("cuda_runtime", "cudaLaunchKernel", 45, 50, correlation=2),
    event("cuda_runtime", "cudaMemcpyAsync", 82, 86, correlation=3),
    event("kernel", "gemm", 25, 55, stream=3, correlation=1),
    event("kernel", "add", 70, 80, stream=3, correlation=2),
    event("gpu_memcpy", "Memcpy DtoH", 90, 95, stream=3, correlation=3, bytes=4096),
    event("python_function", "step", 0, 100),
    {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 1e6, "id": 1},
]

SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
    globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
    gridX INTEGER NOT NULL, blockX INTEGER NOT NULL, registersPerThread INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, srcKind INTEGER, dstKind INTEGER);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER);
"""


def write_chrome(path: Path, events: list, **more: object) -> Path:
    text = json.dumps({"schemaVersion": 1, "deviceProperties": [{"id": 0}], "traceEvents": events, **more})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_nsys(path: Path, without: str = "") -> Path:
    strings = ["cudaLaunchKernel", "cudaMemcpyAsync", "gemm", "add", "forward"]
    ids = {text: i for i, text in enumerate(strings)}

    def ns(microseconds: float) -> int:
        return 5_000_000_000_000 + int(microseconds * 1000)

    with closing(sqlite3.connect(path)) as base:
        base.executescript(SCHEMA)
        base.executemany("INSERT INTO StringIds VALUES (?, ?)", [(i, text) for text, i in ids.items()])
        for name, start, end, correlation in (("gemm", 25, 55, 1), ("add", 70, 80, 2)):
            row = (ns(start), ns(end), 0, 1, None, 3, correlation, 99, ids[name], ids[name], None, 1, 128, 32)
            base.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({','.join('?' * 14)})", row)
        calls = [("cudaLaunchKernel", 15, 20, 1), ("cudaLaunchKernel", 45, 50, 2), ("cudaMemcpyAsync", 82, 86, 3)]
        for name, start, end, correlation in calls:
            row = (ns(start), ns(end), 0, 7, correlation, ids[name], 0, None)
            base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?,?,?,?,?,?,?,?)", row)
        row = (ns(90), ns(95), 0, 1, 3, 3, 99, 4096, 2, 2, 1)
        base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
        ranges = [(0, 100, 59, None, ids["forward"]), (33, None, 34, "a mark", None), (34, 34, 75, "a domain", None)]
        for start, end, kind, text, text_id in ranges:
            row = (ns(start), end and ns(end), kind, None, None, None, text, 7, None, text_id, 0)
            base.execute("INSERT INTO NVTX_EVENTS VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
        if without:
            base.execute(f"DROP TABLE {without}")
        base.commit()
    return path


@pytest.fixture(params=["json", "json.gz", "sqlite"])
def recorded(request, tmp_path) -> traces.Trace:
    path = tmp_path / f"trace.{request.param}"
    return traces.read(write_nsys(path) if request.param == "sqlite" else write_chrome(path, EVENTS))


# The same tables from both formats


def test_kernels_launches_copies_and_ranges_are_the_same_in_both_formats(recorded):
    assert not recorded.warnings
    rows = [recorded.kernels[c].tolist() for c in ("name", "stream", "correlation")]
    assert rows == [["gemm", "add"], [3, 3], [1, 2]]
    assert recorded.kernels["start"].tolist() == pytest.approx([25e-6, 70e-6])
    assert recorded.kernels["duration"].tolist() == pytest.approx([30e-6, 10e-6])
    assert recorded.launches["name"].tolist() == ["cudaLaunchKernel", "cudaLaunchKernel", "cudaMemcpyAsync"]
    assert recorded.memcpy["name"].tolist() == ["Memcpy DtoH"] and recorded.memcpy["bytes"].tolist() == [4096]
    assert recorded.ranges["name"].tolist() == ["forward"]
    for name, table in recorded.tables().items():
        assert tuple(table.columns) == ("name", "start", "duration", *COLUMNS[name])


def test_busy_time_is_that_of_kernels_and_copies(recorded):
    measured = traces.busy(recorded)
    assert measured.wall == pytest.approx(100e-6)
    assert measured.busy == pytest.approx(45e-6) and measured.share == pytest.approx(0.45)


def test_a_launch_costs_its_call_and_its_delay(recorded):
    overhead = traces.launch_overhead(recorded)
    assert overhead["call"].tolist() == pytest.approx([5e-6, 5e-6])
    assert overhead["delay"].tolist() == pytest.approx([5e-6, 20e-6])


def test_copies_have_bytes_and_a_rate(recorded):
    (row,) = traces.memcpy_by_kind(recorded).itertuples(index=False)
    assert (row.name, row.calls, row.bytes) == ("Memcpy DtoH", 1, 4096)
    assert row.rate == pytest.approx(4096 / 5e-6)


def test_gaps_name_the_innermost_thing_that_the_cpu_did(tmp_path):
    recorded = traces.read(write_chrome(tmp_path / "t.json", EVENTS))
    longest = traces.gaps(recorded, top=1)
    assert longest["start"].tolist() == pytest.approx([0.0]) and longest["duration"].tolist() == pytest.approx([25e-6])
    causes = dict(traces.idle_by_cause(recorded)[["doing", "total"]].itertuples(index=False))
    # 0..25: forward 10, mm 10..15 and 20..25, launch 15..20; 55..70: add until 60; 80..90: memcpy call 82..86; 95..100
    expected = {"forward": 31, "aten::mm": 10, "cudaLaunchKernel": 5, "aten::add": 5, "cudaMemcpyAsync": 4}
    assert causes == pytest.approx({name: us * 1e-6 for name, us in expected.items()})


def test_by_time_adds_up_calls_of_a_name_and_puts_the_slowest_first(recorded):
    found = traces.by_time(recorded.launches, top=1)
    assert found["name"].tolist() == ["cudaLaunchKernel"] and found["calls"].tolist() == [2]
    assert found["total"].tolist() == pytest.approx([10e-6]) and found["share"].tolist() == pytest.approx([10 / 14])


# Properties, against a brute-force count of milliseconds


@st.composite
def kernels(draw) -> list[tuple[int, int]]:
    starts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))
    return [(start, start + draw(st.integers(0, 15))) for start in starts]


@settings(max_examples=60, deadline=None)
@given(kernels(), kernels())
def test_busy_and_idle_fill_the_wall_time_and_every_idle_second_has_a_cause(tmp_path_factory, on_gpu, on_cpu):
    events = [event("kernel", f"k{i}", *times, stream=i) for i, times in enumerate(on_gpu)]
    events += [event("user_annotation", f"r{i}", *times) for i, times in enumerate(on_cpu)]
    recorded = traces.read(write_chrome(tmp_path_factory.mktemp("t") / "t.json", events))
    measured = traces.busy(recorded)
    ticks = {tick for start, end in on_gpu for tick in range(start, end)}
    first = min(start for start, _ in on_gpu + on_cpu)
    assert measured.wall == pytest.approx((max(end for _, end in on_gpu + on_cpu) - first) * 1e-6)
    assert measured.busy == pytest.approx(len(ticks) * 1e-6, abs=1e-11)
    assert measured.busy + measured.idle == pytest.approx(measured.wall)
    assert traces.gaps(recorded, top=None)["duration"].sum() == pytest.approx(measured.idle, abs=1e-11)
    assert traces.idle_by_cause(recorded, top=None)["total"].sum() == pytest.approx(measured.idle, abs=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4)), st.integers(1, 9)
)
def test_the_stream_says_what_json_says_whatever_the_chunks(value, chunk):
    text = json.dumps([value, [value], 12345, "x"], ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        assert list(JsonStream(io.StringIO(text)).array()) == json.loads(text)


def test_a_large_trace_is_never_held_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 4096)
    path = write_chrome(tmp_path / "large.json", [event("cpu_op", f"aten::op{i % 5}", i, i + 1) for i in range(20_000)])
    longest = 0
    more = JsonStream._more

    def watched(self, size):
        nonlocal longest
        found = more(self, size)
        longest = max(longest, len(self._buffer))
        return found

    monkeypatch.setattr(JsonStream, "_more", watched)
    assert len(traces.read(path).cpu_ops) == 20_000
    assert longest < 16_384 < path.stat().st_size / 100


# Traces of a CPU


def test_without_kernels_operators_do_the_work_each_without_those_that_it_calls(tmp_path):
    events = [
        event("cpu_op", "aten::linear", 0, 50),
        event("cpu_op", "aten::addmm", 10, 40),
        event("cpu_op", "aten::copy_", 15, 20),
        event("cpu_op", "aten::add", 60, 70),
    ]
    other = event("cpu_op", "aten::mul", 12, 14) | {"tid": 8}
    recorded = traces.read(write_chrome(tmp_path / "t.json", [*events, other]))
    own = dict(traces.self_times(recorded)[["name", "duration"]].itertuples(index=False))
    expected = {"aten::linear": 20, "aten::addmm": 25, "aten::copy_": 5, "aten::add": 10, "aten::mul": 2}
    assert own == pytest.approx({name: us * 1e-6 for name, us in expected.items()})
    assert traces.busy(recorded).busy == pytest.approx(60e-6)
    assert traces.gaps(recorded)["doing"].tolist() == ["(no operator or range)"]


def test_the_recorded_example_shows_the_ranges_of_three_decode_steps():
    assert EXAMPLE.stat().st_size < 300_000
    recorded = traces.read(EXAMPLE)
    assert not recorded.warnings and not len(recorded.kernels)
    calls = recorded.ranges["name"].value_counts().to_dict()
    assert {calls[name] for name in ("schedule", "prepare", "forward", "sample", "finish", "detokenise")} == {3}
    assert calls["attention"] == calls["mlp"] == 3 * 8 and calls["norm"] == 3 * 17
    assert 0.3 < traces.busy(recorded).share < 0.95
    slowest = traces.by_time(traces.self_times(recorded), top=1)
    assert slowest["name"].tolist() == ["mkldnn::_linear_pointwise"]  # the products with bfloat16 weights
    assert {"prepare", "schedule"} < set(traces.idle_by_cause(recorded)["doing"])  # Python between operators


# Damaged and foreign files


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_trace_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path, name):
    source = random.Random(0)
    events = [event("cpu_op", f"aten::op{source.random()}", i, i + 1) for i in range(5000)]
    recorded = traces.read(cut(write_chrome(tmp_path / name, events), 0.6))
    assert 1000 < len(recorded.cpu_ops) < 4000
    (warning,) = recorded.warnings
    assert "damaged after" in warning and "\n" not in warning


def test_garbage_between_events_ends_the_table_with_a_warning(tmp_path):
    path = write_chrome(tmp_path / "t.json", EVENTS)
    path.write_text(path.read_text().replace('{"ph": "X", "cat": "cpu_op", "name": "aten::add"', "\x00garbage", 1))
    recorded = traces.read(path)
    assert recorded.cpu_ops["name"].tolist() == ["aten::mm"] and len(recorded.warnings) == 1


def test_events_without_a_time_are_left_out_and_counted(tmp_path):
    broken = [{"ph": "X", "cat": "cpu_op", "name": "a"}, 3, event("cpu_op", "b", 0, -4), event("kernel", "c", 0, 1)]
    recorded = traces.read(write_chrome(tmp_path / "t.json", [*broken, event("cpu_op", "d", 0, 1, correlation="x")]))
    assert recorded.cpu_ops["name"].tolist() == ["d"] and recorded.kernels["name"].tolist() == ["c"]
    assert recorded.warnings == ("3 events without a name or time were left out",)


def test_a_value_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(json_stream, "LONGEST_VALUE", 1000)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    with pytest.raises(JsonStreamError, match="value expected"):
        list(JsonStream(io.StringIO('["' + "x" * 100_000)).array())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x7fELF\x02\x01", "neither a Chrome trace"),
        (b"[1, 2, 3]", "holds no operators"),
        (b'{"model": "llama"}', "no traceEvents"),
        (b'{"traceEvents": []}', "no traceEvents"),
        (b'{"traceEvents": [', "the file ends in the middle"),
        (b"{" * 100_000, "no Chrome trace"),
        (b"[" * 100_000, "no Chrome trace"),
        (gzip.compress(b'{"traceEvents": [{"a')[:-12], "no Chrome trace"),
        (b"\x1f\x8bnot gzip at all", "no Chrome trace"),
        (b"SQLite format 3\x00" + b"rubbish" * 99, "cannot be read as SQLite"),
    ],
)
def test_what_is_no_trace_is_one_line_that_says_so(tmp_path, content, says):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=says) as caught:
        traces.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(TraceError, match=r"give a \.json"):
            traces.read(path)


def test_another_programs_database_is_refused_by_name(tmp_path):
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE songs (id INTEGER)")
        base.commit()
    with pytest.raises(TraceError, match="no export of Nsight Systems"):
        traces.read(path)


@pytest.mark.parametrize("table", ["CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"])
def test_an_export_may_lack_a_table(tmp_path, table):
    recorded = traces.read(write_nsys(tmp_path / "t.sqlite", without=table))
    assert len(recorded.warnings) == (table != "NVTX_EVENTS")
    assert sum(len(found) for found in recorded.tables().values()) in (5, 4, 6)
    assert traces.busy(recorded).idle >= 0 and len(traces.launch_overhead(recorded)) in (0, 2)


def test_an_export_that_was_cut_off_is_a_line_or_a_partial_table(tmp_path):
    whole = write_nsys(tmp_path / "t.sqlite").read_bytes()
    outcomes = set()
    for size in range(4096, len(whole), 4096):
        path = tmp_path / f"{size}.sqlite"
        path.write_bytes(whole[:size])
        try:
            outcomes.add(bool(traces.read(path).warnings))
        except TraceError as error:
            outcomes.add("\n" not in str(error))
    assert outcomes == {True}


# The command


@pytest.mark.parametrize("name", ["t.json", "t.sqlite"])
def test_titan_trace_prints_the_tables(tmp_path, name):
    path = write_nsys(tmp_path / name) if name.endswith("sqlite") else write_chrome(tmp_path / name, EVENTS)
    done = CliRunner().invoke(make_app(), ["trace", str(path)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    for word in ("gemm", "Memcpy DtoH", "cudaLaunchKernel", "forward", "longest gaps", "45.0 % with kernels"):
        assert word in done.output


def test_titan_trace_of_something_else_is_a_users_mistake(tmp_path):
    done = CliRunner().invoke(make_app(), ["trace", str(tmp_path / "nothing")])
    assert getattr(done.exception, "is_user_error", False)
