"""The rows of `gates.toml`: what a phase is graded on.

    [[gate]]
    id = "0.2"                    # unique in the file
    requirement = "P0.2"
    task = "0.1"                  # the `# TASK 0.1` that it grades
    title = "a KV cache makes decoding fast"
    kind = "ratio"                # exact | count | ratio
    metric = "x faster than the framework at 200 tokens"
    unit = "x"
    threshold = ">= 10"           # <= >= < > ==
    needs = "cpu"                 # see needs.py
    measure = "phase0_prototype.checks:kv_cache_speedup"     # (use: Use) -> float | Measured
    framework = "fails"           # what CI expects of the framework: fails | passes
    because = "Without a cache, n tokens cost n(n+1)/2 forward tokens."

An exact gate may name a pytest node instead of `measure`: `pytest = "phase0_prototype/tests/test_kv_cache.py"`. Its
value is the number of failing tests. A measure that finds that it can't be taken here raises `CannotMeasure`.
"""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.course import needs
from module0_profiling.course.errors import CourseError
from module0_profiling.course.parts import Use
from module0_profiling.course.rows import read, rows

KINDS = ("exact", "count", "ratio")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
THRESHOLD = re.compile(r"(<=|>=|==|<|>)\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Measured:
    """What a measure may return instead of a bare number.

    Attributes:
        value: compared with the threshold, in the gate's unit.
        detail: shown beside it, such as `212 ms against 2.4 s`.
        spread: (max - min) / median of the rounds of a ratio.
    """

    value: float
    detail: str = ""
    spread: float | None = None


@dataclass(frozen=True)
class Gate:
    """One row of gates.toml; the module's text says what each key means."""

    id: str
    requirement: str
    task: str
    title: str
    kind: str
    metric: str
    threshold: str
    framework: str
    because: str
    unit: str = ""
    needs: str = "cpu"
    measure: str = ""
    pytest: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CourseError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.framework not in ("passes", "fails"):
            raise CourseError(f"framework {self.framework!r} is neither passes nor fails")
        if not re.fullmatch(r"\d+\.\d+", self.task):
            raise CourseError(f"task {self.task!r} is not numbered like 0.1")
        if not THRESHOLD.fullmatch(self.threshold):
            raise CourseError(f"threshold {self.threshold!r} is not a comparison such as '>= 10'")
        if bool(self.measure) == bool(self.pytest):
            raise CourseError("give one of measure and pytest")
        if self.pytest and self.kind != "exact":
            raise CourseError(f"a {self.kind} gate needs a measure: pytest only tells right from wrong")
        if self.measure and not re.fullmatch(r"[\w.]+:\w+", self.measure):
            raise CourseError(f"measure {self.measure!r} is not module:function")
        needs.split(self.needs)

    def holds(self, value: float) -> bool:
        """Whether a value meets the threshold; NaN never does."""
        match = THRESHOLD.fullmatch(self.threshold)
        assert match is not None
        return COMPARISONS[match[1]](value, float(match[2]))

    def function(self) -> Callable[[Use], float | Measured]:
        """The measure, imported.

        Raises:
            CourseError: the module has no such function.
        """
        module, _, name = self.measure.partition(":")
        found = getattr(importlib.import_module(module), name, None)
        if not callable(found):
            raise CourseError(f"gate {self.id}: {module} has no function {name}")
        return found  # type: ignore[no-any-return]


def load(phase: str, root: Path | None = None) -> list[Gate]:
    """The gates of a phase in the order in which they are graded: exact, then count, then ratio.

    Raises:
        CourseError: one line naming the file, the row and the key at fault.
    """
    file = file_of(phase, root)
    found = rows(file, "gate", Gate, others=("solution_only", "framework_only"))
    seen: set[str] = set()
    for gate in found:
        if gate.id in seen:
            raise CourseError(f"{file}: two gates have the id {gate.id}")
        seen.add(gate.id)
    return sorted(found, key=lambda gate: KINDS.index(gate.kind))


def one_sided(phase: str, side: str, root: Path | None = None) -> tuple[str, ...]:
    """Public names that only one side need have: `solution_only = ["kv_cache.Page"]` at the top of gates.toml.

    Args:
        side: `solution` or `framework`.
    """
    return tuple(read(file_of(phase, root)).get(f"{side}_only", ()))


def file_of(phase: str, root: Path | None = None) -> Path:
    """Where the gates of a phase are written."""
    return (root or rooms.ROOT) / rooms.room(phase, root) / "gates.toml"
