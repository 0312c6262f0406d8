"""Reads what `ncu --csv` prints into `KernelCounters`, in SI units; a metric that was not taken is absent, never zero.

`--page raw` has a row for each launch and a column for each metric, with the units in a second header row. `--page
details` has a row for each metric of each launch, under the labels of the sections SpeedOfLight, Occupancy and
LaunchStats, or under the metric's own name when it was asked for with `--metrics`. Around the table stand lines of ncu
("==PROF== ...") and whatever the profiled program printed. Numbers follow the locale: 1,234.5 or 1.234,5.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from module0_profiling.ncu import KernelCounters, NcuError

LABELS = {  # (label on the details page, whether its unit is %) -> metric: "Memory Throughput" stands there twice
    ("Duration", False): "gpu__time_duration.sum",
    ("DRAM Throughput", True): "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ("Memory Throughput", True): "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    ("Memory Throughput", False): "dram__bytes.sum.per_second",
    ("Compute (SM) Throughput", True): "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    ("Achieved Occupancy", True): "sm__warps_active.avg.pct_of_peak_sustained_active",
    ("Theoretical Occupancy", True): "sm__maximum_warps_per_active_cycle_pct",
    ("Registers Per Thread", False): "launch__registers_per_thread",
    ("Waves Per SM", False): "launch__waves_per_multiprocessor",
    ("Block Limit Registers", False): "launch__occupancy_limit_registers",
    ("Block Limit Shared Mem", False): "launch__occupancy_limit_shared_mem",
    ("Block Limit SM", False): "launch__occupancy_limit_blocks",
    ("Block Limit Warps", False): "launch__occupancy_limit_warps",
    ("Block Limit Barriers", False): "launch__occupancy_limit_barriers",
}
DESCRIPTION = {"ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Kernel Time", "Context", "Stream"}
DESCRIPTION |= {"Block Size", "Grid Size", "Device", "CC"}
PREFIXES = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
TIMES = {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES = re.compile(r"(?P<prefix>[KkMGTP]?)(?:byte|B)(?:/(?P<per>\w+))?")


def read(path: Path) -> list[KernelCounters]:
    """The launches of a file that `ncu --csv` printed, in their order.

    Raises:
        NcuError: when the file cannot be read, is no such file, or is cut off.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise NcuError(f"{path}: {error.strerror or error}") from error
    return parse(text, str(path))


def parse(text: str, where: str = "ncu output") -> list[KernelCounters]:
    """Like `read`, of text; `where` names it in messages."""
    if not text.strip():
        raise NcuError(f"{where} is empty: did ncu find a kernel to profile? Its messages are on the terminal")
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if _is_header(line)), None)
    if start is None:
        raise NcuError(f"{where} {_why_no_header(lines)}")
    table = [line.rstrip() for line in lines[start:] if line.startswith('"')]  # the rest is the program's own output
    if not table[-1].endswith(('"', ",")):
        raise NcuError(f"{where} is cut off in its last line: take it again")
    try:
        header, *rows = csv.reader(io.StringIO("\n".join(table)))
    except csv.Error as error:
        raise NcuError(f"{where} is not comma separated text ({error}): take it again") from error
    header = [name.strip() for name in header]
    build = _from_details if "Metric Name" in header else _from_raw
    kernels = build(header, rows, where)
    if not kernels:
        raise NcuError(f"{where} has a header and no kernel: no launch matched the filter, or the run was cut off")
    return kernels


def _is_header(line: str) -> bool:
    return line.startswith('"ID"') and '"Kernel Name"' in line


def _why_no_header(lines: Sequence[str]) -> str:
    problem = next((line for line in lines if line.startswith("==ERROR==")), "")
    if problem:
        return f"holds no counters, ncu said: {problem.removeprefix('==ERROR==').strip()}"
    if any(line.startswith("==PROF==") for line in lines):
        return "has ncu's messages but no table: take it with --csv --page raw, and redirect the output to the file"
    return "is not ncu's output: take it with `titan ncu-command`, or ncu --import x.ncu-rep --csv --page raw"


def _from_raw(header: list[str], rows: list[list[str]], where: str) -> list[KernelCounters]:
    at = header.index("Kernel Name")
    if rows and not rows[0][at].strip() and len(rows[0]) == len(header):
        units, rows = rows[0], rows[1:]
    else:
        raise NcuError(f"{where} lacks the row of units under its header: is it `ncu --csv --page raw`?")
    columns = [i for i, name in enumerate(header) if name not in DESCRIPTION and name]
    comma = _decimal_comma(row[i] for row in rows for i in columns if i < len(row))
    kernels = []
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise NcuError(
                f"{where} is cut off: launch {number} has {len(row)} columns of {len(header)}, take it again"
            )
        metrics = {header[i]: value for i in columns if (value := _value(row[i], units[i], comma)) is not None}
        kernels.append(_counters(dict(zip(header, row, strict=True)), metrics))
    return kernels


def _from_details(header: list[str], rows: list[list[str]], where: str) -> list[KernelCounters]:
    needed = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
    missing = [name for name in needed if name not in header]
    if missing:
        raise NcuError(f"{where} lacks the column {missing[0]!r}: is it `ncu --csv --page details`?")
    last = max(header.index(name) for name in needed)
    comma = _decimal_comma(row[header.index("Metric Value")] for row in rows if len(row) > last)
    seen: dict[tuple[str, str], tuple[dict[str, str], dict[str, float]]] = {}
    for row in rows:
        if len(row) <= last:
            raise NcuError(f"{where} is cut off: its last row has {len(row)} columns of {len(header)}, take it again")
        cells = dict(zip(header, row, strict=False))
        key = (cells.get("Process ID", ""), cells["ID"])
        metrics = seen.setdefault(key, (cells, {}))[1]
        name, unit = cells["Metric Name"].strip(), cells["Metric Unit"].strip()
        name = LABELS.get((name, unit == "%"), name)
        value = _value(cells["Metric Value"], unit, comma)
        if name and value is not None:
            metrics.setdefault(name, value)
    return [_counters(cells, metrics) for cells, metrics in seen.values()]


def _counters(cells: Mapping[str, str], metrics: Mapping[str, float]) -> KernelCounters:
    kernel, grid, block, capability = (
        cells.get(name, "").strip() for name in ("Kernel Name", "Grid Size", "Block Size", "CC")
    )
    return KernelCounters(kernel, grid, block, capability, metrics)


def _value(text: str, unit: str, comma: bool) -> float | None:
    """A cell in SI units; None for an empty cell, "n/a" and text."""
    thousands, decimal = (".", ",") if comma else (",", ".")
    try:
        number = float(_without_spaces(text).replace(thousands, "").replace(decimal, "."))
    except ValueError:
        return None
    return number * _factor(unit.strip()) if math.isfinite(number) else None


def _without_spaces(text: str) -> str:
    """Spaces of any width and apostrophes separate thousands in some locales, and mean nothing else."""
    return re.sub(r"[\s'’]", "", text)


def _factor(unit: str) -> float:
    """What a number in `unit` is multiplied by to be in seconds, bytes or bytes/s; 1 for counts and percent."""
    if unit in TIMES:
        return TIMES[unit]
    if match := _BYTES.fullmatch(unit):
        per = match["per"] or ""
        return PREFIXES[match["prefix"]] / TIMES.get(per, 1.0)
    return 1.0


def _decimal_comma(cells: Iterable[str]) -> bool:
    """Whether numbers are written as in 1.234,5: ncu follows the locale. One cell that leaves no doubt decides."""
    for cell in cells:
        digits = _without_spaces(cell)
        if re.fullmatch(r"-?[\d.,]+", digits) is None:
            continue
        if "," in digits and "." in digits:
            return digits.rfind(",") > digits.rfind(".")
        for mark, other in ((",", "."), (".", ",")):
            if mark in digits and re.fullmatch(rf"-?[1-9]\d{{0,2}}(\{mark}\d{{3}})+", digits) is None:
                return mark == ","  # it cannot separate thousands
            if digits.count(mark) > 1:
                return other == ","
    return False
