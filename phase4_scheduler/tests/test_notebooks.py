"""The notebook of phase 4: it runs from top to bottom, its predictions hold, and what is saved is what it says.

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

SOURCES = notebooks.sources("phase4_scheduler")
CONCLUSIONS = {  # one or more of each section, in order
    "01_who_runs_when": (
        "framework: 400 steps as predicted, 48% of the places are for nobody",
        "solution: 240 steps as predicted, 12% of the places are for nobody",
        "fewer steps: 1.67 x; in this run",
        "predicted: the knee is at",
        "whole prompts: 908 tokens in the largest step, 1 steps to the first token, as predicted",
        "in pieces: 72 tokens in the largest step, 15 steps to the first token, as predicted",
        "by arrival 1,758 s, the shortest first 868 s on average, both as predicted",
        "the long one waits 9 s by arrival, 999 s with the shortest first",
        "ageing, 1 token a second: 229 s, 23 go first; every prediction is exact",
        "saturation: predicted 11.2 requests/s, found",
        "one after the other: predicted 71% busy with 2 ms of host, 45% with 6;",
        "one ahead: predicted 100% busy with 2 ms of host, 83% with 6;",
        "rows for nothing, by length and by stop token: (0, 0) and (0, 8), as predicted",
        "tokens a step: framework 4, solution 8, as predicted",
        "tokens of the streams are those of the offline engine; nothing is left open, and no process",
        "HTTP adds",
        "short and long answers: 1.90 x the fewest steps",
        "launched before the last step was collected: 0% of the steps",
    ),
}
PICTURES = {"01_who_runs_when": 9}

each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(notebook: Any) -> str:
    """What the code cells printed, as plain text."""
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    return "\n".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in outputs)


def test_there_is_one() -> None:
    assert [source.stem for source in SOURCES] == list(CONCLUSIONS)


@each
def test_it_runs_from_top_to_bottom_and_comes_to_every_conclusion(source: Path) -> None:
    notebook = notebooks.execute(source, timeout=300)
    assert all(cell.execution_count for cell in _code(notebook))
    printed = _printed(notebook)
    places = [printed.find(conclusion) for conclusion in CONCLUSIONS[source.stem]]
    assert -1 not in places, CONCLUSIONS[source.stem][places.index(-1)]
    assert places == sorted(places)


@each
def test_the_saved_notebook_is_that_of_its_script_and_was_run_without_error(source: Path) -> None:
    assert notebooks.drift(source) == ""


@each
def test_the_saved_notebook_shows_conclusions_and_pictures(source: Path) -> None:
    import nbformat

    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    printed = _printed(notebook)
    assert [conclusion for conclusion in CONCLUSIONS[source.stem] if conclusion not in printed] == []
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == PICTURES[source.stem]
    assert not [out for out in outputs if out.get("name") == "stderr" or "Warning" in str(out.get("data", ""))[:2000]]


@each
def test_every_section_predicts_and_asserts_its_conclusion(source: Path) -> None:
    sections = source.read_text(encoding="utf-8").split("\n# ## ")[1:]
    assert [section[0] for section in sections] == [*"12345", "Y"]
    assert [section[:2] for section in sections[:5] if "assert " not in section] == []
    assert [section[:2] for section in sections[:5] if "**Predict" not in section] == []


@each
def test_saved_outputs_name_no_folder_of_the_machine_that_made_them(source: Path) -> None:
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not [place for place in (str(rooms.ROOT), str(Path.home()) + "/", sys.prefix) if place in text]
