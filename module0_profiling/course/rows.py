"""Read the course's TOML files into dataclasses; a key that nobody knows is rejected by name."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from module0_profiling.course.errors import CourseError

Row = TypeVar("Row")


def read(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        CourseError: missing or malformed; the line names the file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CourseError(f"{path} does not exist: every phase with a framework needs it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CourseError(f"{path} is not TOML: {error}") from None


def rows(path: Path, table: str, row: type[Row], *, others: tuple[str, ...] = ()) -> list[Row]:
    """The rows `[[table]]` of a file as dataclasses.

    Args:
        path: the TOML file.
        table: name of the array of tables.
        row: dataclass whose fields are the keys; its own ValueErrors are passed on with file and row.
        others: top-level names that the file may have besides.

    Raises:
        CourseError: an unknown table or key, a missing key, or a value of the wrong type.
    """
    content = read(path)
    unknown = sorted(set(content) - {table, *others})
    if unknown:
        raise CourseError(f"{path}: unknown table {', '.join(unknown)}: write [[{table}]]")
    return [_row(path, f"{table} {index}", data, row) for index, data in enumerate(content.get(table, []), start=1)]


def _row(path: Path, where: str, data: dict[str, Any], row: type[Row]) -> Row:
    where = f"{path}: {where}" + (f" ({data['id']})" if "id" in data else "")
    known = {field.name: field for field in fields(row)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise CourseError(f"{where}: unknown key {', '.join(unknown)}: the keys are {', '.join(known)}")
    required = [name for name, field in known.items() if field.default is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise CourseError(f"{where}: {', '.join(missing)} is missing")
    types = get_type_hints(row)
    for name, value in data.items():
        if type(value) is not types[name]:
            raise CourseError(f"{where}: {name} is {value!r}, it must be a {types[name].__name__}")
    try:
        return row(**data)
    except CourseError as error:
        raise CourseError(f"{where}: {error}") from None
