"""The notebook of phase 1: it runs from top to bottom, its predictions hold, and what is saved is what its script says.

Each section ends in assertions of its own, which fail the cell. Here it is that nothing was left out, and that what a
reader of the saved notebook sees is right.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from module0_profiling import notebooks, rooms

for library in ("jupytext", "nbclient", "nbformat", "ipykernel", "matplotlib", "pandas"):
    pytest.importorskip(library, reason=f"notebooks need {library}: pip install 'titaninfer[notebooks]'")

SOURCES = notebooks.sources("phase1_memory")
QUICK = {"OMP_NUM_THREADS": "1"}  # beside other tests, threads of tiny tensors only wait for each other
CONCLUSIONS = (  # one or more of each section, in order
    "rows: 8.1% of the memory that was given holds tokens",
    "steps for the same 24 requests in the same memory: 288 and 24",
    "predicted: framework 2 x 105 blocks = 210, solution at most one a step",
    "x as fast as one gather",
    "both engines say the same eight things",
    "the same 576 tokens four times",
    "max: 390 requests, as predicted",
    "framework: the same tokens as the solution",
)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(notebook: Any) -> str:
    """What the code cells printed, as plain text."""
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    return "\n".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in outputs)


def test_there_is_one() -> None:
    assert [source.stem for source in SOURCES] == ["01_from_rows_to_blocks"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_runs_from_top_to_bottom_and_comes_to_every_conclusion(source: Path) -> None:
    notebook = notebooks.execute(source, timeout=300, environment=QUICK)
    assert all(cell.execution_count for cell in _code(notebook))
    printed = _printed(notebook)
    places = [printed.find(conclusion) for conclusion in CONCLUSIONS]
    assert -1 not in places, CONCLUSIONS[places.index(-1)]
    assert places == sorted(places)
    assert printed.count("every prediction is exact") == 3


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_saved_notebook_is_that_of_its_script_and_was_run_without_error(source: Path) -> None:
    assert notebooks.drift(source) == ""


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_saved_notebook_shows_conclusions_and_pictures(source: Path) -> None:
    import nbformat

    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    printed = _printed(notebook)
    assert [conclusion for conclusion in CONCLUSIONS if conclusion not in printed] == []
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 8
    assert not [out.text for out in outputs if out.get("name") == "stderr"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_section_asserts_its_conclusion(source: Path) -> None:
    sections = source.read_text(encoding="utf-8").split("\n# ## ")[1:]
    assert [section[0] for section in sections] == [*"12345", "Y"]
    assert [section[:2] for section in sections[:5] if "\nassert " not in section] == []
    assert [section[:2] for section in sections[:5] if "**Predict" not in section] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_saved_outputs_name_no_folder_of_the_machine_that_made_them(source: Path) -> None:
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not [place for place in (str(rooms.ROOT), str(Path.home()) + "/", sys.prefix) if place in text]
