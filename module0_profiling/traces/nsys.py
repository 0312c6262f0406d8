"""SQLite exports of Nsight Systems: `nsys profile --trace cuda,nvtx ...`, then `nsys export --type sqlite`.

Tables are made when something was recorded for them, and columns come and go between versions, so each is optional.
The schema is described in the "SQLite Export Schema Reference" of the Nsight Systems documentation. Times are
nanoseconds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from module0_profiling.traces.tables import Trace, TraceBuilder, TraceError

PUSH_POP, START_END = 59, 60  # NVTX_EVENTS.eventType: ranges; the others are marks, names and domains
COPY_KINDS = ("unknown", "HtoD", "DtoH", "HtoA", "AtoH", "AtoA", "AtoD", "DtoA", "DtoD", "HtoH", "peer")  # CUPTI's
EXPECTED = ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME")


def read(path: Path) -> Trace:
    """Read an export.

    Raises:
        TraceError: the file is damaged, is another program's database, or holds no events.
    """
    builder = TraceBuilder()
    warnings: list[str] = []
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            schema = _schema(database)
            if not {"StringIds", "NVTX_EVENTS", *EXPECTED} & schema.keys():
                raise TraceError(f"{path} is SQLite, but no export of Nsight Systems: nsys export --type sqlite")
            warnings += [f"{path} has no {t}: nothing of it was traced" for t in EXPECTED if t not in schema]
            try:
                _fill(builder, database, schema)
            except sqlite3.DatabaseError as error:
                warnings.append(f"{path} is damaged ({error}): what came before was read")
    except sqlite3.Error as error:
        raise TraceError(f"{path} cannot be read as SQLite ({error}): export it again") from None
    return builder.build("nsys", path, 1e-9, tuple(warnings))


def _schema(database: sqlite3.Connection) -> dict[str, set[str]]:
    """Table -> columns."""
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {table: {row[1] for row in database.execute(f'PRAGMA table_info("{table}")')} for table in tables}


def _fill(builder: TraceBuilder, database: sqlite3.Connection, schema: dict[str, set[str]]) -> None:
    strings = dict(database.execute("SELECT id, value FROM StringIds")) if "StringIds" in schema else {}

    def rows(table: str, *wanted: str) -> Iterator[tuple[int | None, ...]]:
        """Rows of finished events: start, end and the wanted columns, None where this version has no such column."""
        if not {"start", "end"} <= schema.get(table, set()):
            return
        columns = ", ".join(f'"{c}"' if c in schema[table] else "NULL" for c in ("start", "end", *wanted))
        yield from database.execute(f'SELECT {columns} FROM "{table}" WHERE "end" >= "start"')

    def named(*keys: int | None) -> str:
        return next((strings[key] for key in keys if key in strings), "?")

    for start, end, long, short, stream, correlation in rows(
        "CUPTI_ACTIVITY_KIND_KERNEL", "demangledName", "shortName", "streamId", "correlationId"
    ):
        builder.add("kernels", named(long, short), start or 0, _length(start, end), _id(stream), _id(correlation))
    for start, end, kind, size, stream, correlation in rows(
        "CUPTI_ACTIVITY_KIND_MEMCPY", "copyKind", "bytes", "streamId", "correlationId"
    ):
        label = f"Memcpy {COPY_KINDS[kind] if kind is not None and 0 <= kind < len(COPY_KINDS) else kind}"
        builder.add("memcpy", label, start or 0, _length(start, end), _id(stream), _id(correlation), size or 0)
    for start, end, size, stream, correlation in rows(
        "CUPTI_ACTIVITY_KIND_MEMSET", "bytes", "streamId", "correlationId"
    ):
        builder.add("memcpy", "Memset", start or 0, _length(start, end), _id(stream), _id(correlation), size or 0)
    for start, end, name, thread, correlation in rows(
        "CUPTI_ACTIVITY_KIND_RUNTIME", "nameId", "globalTid", "correlationId"
    ):
        builder.add("launches", named(name), start or 0, _length(start, end), _id(thread), _id(correlation))
    for start, end, kind, text, text_id, thread in rows("NVTX_EVENTS", "eventType", "text", "textId", "globalTid"):
        if kind in (PUSH_POP, START_END):
            builder.add("ranges", str(text or named(text_id)), start or 0, _length(start, end), _id(thread))


def _length(start: int | None, end: int | None) -> int:
    return (end or 0) - (start or 0)


def _id(value: int | None) -> int:
    return -1 if value is None else value
