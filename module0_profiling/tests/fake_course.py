"""A tiny course of two phases in a temporary folder: prefix sums (phase0); doubling by a table and in CUDA (phase1)."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

FILES = {
    "phase0_alpha/__init__.py": "",
    "phase0_alpha/sums.py": '''
        """Prefix sums, each from the one before."""

        from collections.abc import Callable

        def prefix_sums(numbers: list[int], add: Callable[[int, int], int]) -> list[int]:
            """Sum of the first k numbers for every k."""
            total, sums = 0, []
            for number in numbers:
                total = add(total, number)
                sums.append(total)
            _check(numbers, sums)
            return sums

        def _check(numbers: list[int], sums: list[int]) -> None:
            longest = max(len(numbers), len(sums))
            shortest = min(len(numbers), len(sums))
            difference = longest - shortest
            message = "lengths differ by {}".format(difference)
            if difference > 0:
                raise ValueError(message)
        ''',
    "phase0_alpha/framework/__init__.py": "",
    "phase0_alpha/framework/sums.py": '''
        """Prefix sums, each from the beginning."""

        from collections.abc import Callable

        def prefix_sums(numbers: list[int], add: Callable[[int, int], int]) -> list[int]:
            """Sum of the first k numbers for every k."""
            sums = []
            for end in range(1, len(numbers) + 1):  # TASK 0.1: what is computed twice?
                total = 0
                for number in numbers[:end]:
                    total = add(total, number)
                sums.append(total)
            return sums
        ''',
    "phase0_alpha/checks.py": """
        from itertools import accumulate
        from operator import add
        from pathlib import Path

        from module0_profiling.course.gates import Measured
        from module0_profiling.course.parts import Use, resolve

        ROOT = Path(__file__).parent.parent
        NUMBERS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]

        def mismatches(use: Use) -> float:
            got = resolve("phase0_alpha", "sums", use, ROOT).prefix_sums(NUMBERS, add)
            return sum(a != b for a, b in zip(got, accumulate(NUMBERS), strict=True))

        def additions(use: Use) -> Measured:
            calls = []
            resolve("phase0_alpha", "sums", use, ROOT).prefix_sums(NUMBERS, lambda a, b: calls.append(0) or a + b)
            return Measured(len(calls), f"{len(NUMBERS)} numbers")

        def speedup(use: Use) -> Measured:
            return Measured(55 / additions(use).value, spread=0.01)

        def never(use: Use) -> float:
            raise AssertionError("a gate with an absent need was measured")
        """,
    "phase0_alpha/gates.toml": """
        [[gate]]
        id = "0.3"
        requirement = "P0.1"
        task = "0.1"
        title = "fast"
        kind = "ratio"
        metric = "fewer additions than the framework"
        unit = "x"
        threshold = ">= 5"
        measure = "phase0_alpha.checks:speedup"
        framework = "fails"
        because = "It adds everything again."

        [[gate]]
        id = "0.2"
        requirement = "P0.1"
        task = "0.1"
        title = "few additions"
        kind = "count"
        metric = "additions"
        threshold = "== 10"
        measure = "phase0_alpha.checks:additions"
        framework = "fails"
        because = "Ten numbers need ten additions."

        [[gate]]
        id = "0.1"
        requirement = "P0.1"
        task = "0.1"
        title = "right"
        kind = "exact"
        metric = "wrong sums"
        threshold = "== 0"
        measure = "phase0_alpha.checks:mismatches"
        framework = "passes"
        because = "The sums are those of itertools.accumulate."

        [[gate]]
        id = "0.1-tests"
        requirement = "P0.1"
        task = "0.1"
        title = "right on lists of every length"
        kind = "exact"
        metric = "failing tests"
        threshold = "== 0"
        pytest = "phase0_alpha/tests/test_sums.py"
        framework = "passes"
        because = "An empty list has no sums."

        [[gate]]
        id = "0.4"
        requirement = "P0.2"
        task = "0.1"
        title = "fast on a machine that nobody has"
        kind = "ratio"
        metric = "faster"
        unit = "x"
        threshold = ">= 0"
        needs = "cpu,no_such_package"
        measure = "phase0_alpha.checks:never"
        framework = "fails"
        because = "Nobody knows."
        """,
    "phase0_alpha/hints.toml": "".join(
        f"""
        [[hint]]
        task = "0.1"
        level = {level}
        text = "hint number {level}"
        """
        for level in (1, 2, 3)
    ),
    "phase0_alpha/planted.toml": """
        [[bug]]
        file = "sums.py"
        find = "total = add(total, number)"
        replace = "total = add(total, abs(number))"
        caught_by = "phase0_alpha/tests/test_sums.py::test_negative_numbers"
        why = "negative numbers are summed with their sign"

        [[bug]]
        file = "sums.py"
        find = "total = add(total, number)"
        replace = "total = add(add(total, number), 0)"
        caught_by = "0.2"
        why = "each number is added once"
        """,
    "phase0_alpha/tests/test_sums.py": """
        from operator import add
        from pathlib import Path

        import pytest

        from module0_profiling.course.parts import Use, resolve

        ROOT = Path(__file__).parent.parent.parent
        USE = Use.from_env("phase0", default="solution", root=ROOT)

        @pytest.fixture
        def prefix_sums():
            return resolve("phase0_alpha", "sums", USE, ROOT).prefix_sums

        def test_empty(prefix_sums):
            assert prefix_sums([], add) == []

        def test_negative_numbers(prefix_sums):
            assert prefix_sums([1, -2, 3], add) == [1, -1, 2]
        """,
    "phase1_beta/__init__.py": "",
    "phase1_beta/double.py": """
        from phase1_beta.tables import table

        def double(number: int) -> int:
            return table(number)[number]
        """,
    "phase1_beta/tables.py": """
        def table(top: int) -> list[int]:
            return [2 * number for number in range(top + 1)]
        """,
    "phase1_beta/kernels/twice.cu": """
        extern "C" __global__ void twice(const float* __restrict__ in, float* out, int n) {
            int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) out[i] = 2.0f * in[i];
        }
        """,
    "phase1_beta/framework/__init__.py": "",
    "phase1_beta/framework/double.py": """
        from .tables import table

        def double(number: int) -> int:
            return table(number)[-1]  # TASK 1.1
        """,
    "phase1_beta/framework/tables.py": """
        def table(top: int) -> list[int]:
            return [number + number for number in range(top + 1)]
        """,
    "phase1_beta/framework/kernels/twice.cu": """
        // TASK 1.1: neighbours should read neighbours
        extern "C" __global__ void twice(const float* in, float* out, int n) {
            int i = threadIdx.x * gridDim.x + blockIdx.x;
            if (i < n) out[i] = in[i] + in[i];
        }
        """,
    "phase1_beta/checks.py": """
        def zero(use):
            return 0
        """,
    "phase1_beta/gates.toml": """
        [[gate]]
        id = "1.1"
        requirement = "P1.1"
        task = "1.1"
        title = "right"
        kind = "exact"
        metric = "errors"
        threshold = "== 0"
        measure = "phase1_beta.checks:zero"
        framework = "passes"
        because = "Twice is twice."
        """,
    "phase1_beta/hints.toml": """
        [[hint]]
        task = "1.1"
        level = 1
        text = "look"
        """,
    "phase1_beta/planted.toml": "",
}


def build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the course, make it importable until the test ends, and return its root."""
    for name, text in FILES.items():
        write(folder / name, text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("IMPL", raising=False)
    monkeypatch.setenv(
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"
    )  # the course needs none, and each costs every process time
    for name in [name for name in sys.modules if name.partition(".")[0] in ("phase0_alpha", "phase1_beta")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def write(path: Path, text: str) -> None:
    """Write dedented text, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")


def edit(path: Path, find: str, replace: str) -> None:
    """Replace a text that occurs once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(find) == 1, (path, find)
    path.write_text(text.replace(find, replace), encoding="utf-8")


def solve(root: Path) -> None:
    """Put the solution of phase0 where the learner's file is."""
    mine = root / "workspace" / "phase0_alpha" / "sums.py"
    mine.write_text((root / "phase0_alpha" / "sums.py").read_text(encoding="utf-8"), encoding="utf-8")
