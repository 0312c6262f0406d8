"""The notebooks of module 0: their counts are right on every machine, and what is saved is what their scripts say.

Their checks of times may fail here: tests share the cores. Checks of counts, bytes and results may not.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from module0_profiling import notebooks, rooms

for library in ("jupytext", "nbclient", "nbformat", "ipykernel", "matplotlib", "pandas"):
    pytest.importorskip(library, reason=f"notebooks need {library}: pip install 'titaninfer[notebooks]'")

SOURCES = notebooks.sources("module0_profiling")
# Beside other tests, threads only wait for each other; compiling takes longer than all else in these notebooks.
QUICK = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
COUNTS = {"01_batch_one_linear": 5, "02_matmul_1024": 10}  # the least that needs neither a compiler nor a GPU


def _printed(cell: dict) -> list[str]:
    """The lines that a code cell printed."""
    return "".join(out.get("text", "") for out in cell.outputs).splitlines()


def test_there_are_two() -> None:
    assert [source.stem for source in SOURCES] == list(COUNTS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_runs_from_top_to_bottom_and_every_count_is_as_predicted(source: Path) -> None:
    notebook = notebooks.execute(source, timeout=300, environment=QUICK)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for cell in code for line in _printed(cell)]
    assert all(cell.execution_count for cell in code)
    assert not [line for line in lines if line.startswith("prediction is wrong (count)")]
    assert sum(line.startswith("prediction holds (count)") for line in lines) >= COUNTS[source.stem]
    assert any("(time)" in line for line in lines)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_saved_notebook_is_that_of_its_script_and_was_run_without_error(source: Path) -> None:
    assert notebooks.drift(source) == ""


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_saved_outputs_name_no_folder_of_the_machine_that_made_them(source: Path) -> None:
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not [place for place in (str(rooms.ROOT), str(Path.home()) + "/", sys.prefix) if place in text]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_prediction_of_the_learner_is_left_open(source: Path) -> None:
    asked = [cell.source for cell in notebooks.read(source).cells if cell.source.startswith("MINE = ")]
    assert len(asked) >= 5
    for cell in asked:
        assert set(ast.literal_eval(cell.removeprefix("MINE = ")).values()) == {None}
