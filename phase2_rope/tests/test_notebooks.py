"""The notebook of phase 2: it runs from top to bottom, its predictions hold, and what is saved is what its script says.

Each section ends in assertions of its own, which fail the cell. Here it is that nothing was left out, and that what a
reader of the saved notebook sees is right.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from module0_profiling import notebooks, rooms
from module0_profiling.course.needs import absent

for library in ("jupytext", "nbclient", "nbformat", "ipykernel", "matplotlib", "pandas"):
    pytest.importorskip(library, reason=f"notebooks need {library}: pip install 'titaninfer[notebooks]'")

SOURCES = notebooks.sources("phase2_rope")
QUICK = {"OMP_NUM_THREADS": "1"}  # beside other tests, threads of tiny tensors only wait for each other
CONCLUSIONS = (  # one or more of each section, in order
    "46 of 64 hands went round within 4,096 tokens, as predicted",
    "the rule holds for every token; chunks and neighbours change no bit",
    "cosines and sines for each head: 5,120 bytes a token; q and k, in and out: 5,120",
    "framework: 14 operations read or write q and k 9 times",
    "solution: 4 operations read or write q and k 5 times",
    "the latent is 71.1 x smaller than what it stands for",
    "a token has 4,608 bytes in this cache, as predicted; as heads it would have 40,960",
    "framework and solution say the same",
    "of the attention's FLOPs 99.8% are expanding, by the shapes",
    "absorbing is less below 170.7 new tokens if n is large, below 157 if n is 1,024",
    "by FLOPs the solution would be 108 x faster",
    "framework: the same tokens as the solution",
    "operations of a turn: 14, the solution 4",
)
COUNTED = (  # by an emulation that a C++ compiler builds
    "turned and written in two launches: 1.14 x the bytes of one",
    "bytes of your kernel over the fewest, turn: 1.86",
)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(notebook: Any) -> str:
    """What the code cells printed, as plain text."""
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    return "\n".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in outputs)


def test_there_is_one() -> None:
    assert [source.stem for source in SOURCES] == ["01_turning_and_latents"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_runs_from_top_to_bottom_and_comes_to_every_conclusion(source: Path) -> None:
    notebook = notebooks.execute(source, timeout=300, environment=QUICK)
    assert all(cell.execution_count for cell in _code(notebook))
    printed = _printed(notebook)
    places = [printed.find(conclusion) for conclusion in CONCLUSIONS]
    assert -1 not in places, CONCLUSIONS[places.index(-1)]
    assert places == sorted(places)
    if absent("compiler"):
        assert "bytes and requests of the ladder: NOT MEASURED HERE" in printed
        assert printed.count("every prediction is exact") == 3
    else:
        assert [conclusion for conclusion in COUNTED if conclusion not in printed] == []
        assert printed.count("every prediction is exact") == 4


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_saved_notebook_is_that_of_its_script_and_was_run_without_error(source: Path) -> None:
    assert notebooks.drift(source) == ""


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_saved_notebook_shows_conclusions_and_pictures(source: Path) -> None:
    import nbformat

    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    printed = _printed(notebook)
    assert [conclusion for conclusion in (*CONCLUSIONS, *COUNTED) if conclusion not in printed] == []
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 10
    assert not [out.text for out in outputs if out.get("name") == "stderr"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_section_asserts_its_conclusion(source: Path) -> None:
    sections = source.read_text(encoding="utf-8").split("\n# ## ")[1:]
    assert [section[0] for section in sections] == [*"12345", "Y"]
    assert [section[:2] for section in sections[:5] if "assert " not in section] == []
    assert [section[:2] for section in sections[:5] if "**Predict" not in section] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_saved_outputs_name_no_folder_of_the_machine_that_made_them(source: Path) -> None:
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not [place for place in (str(rooms.ROOT), str(Path.home()) + "/", sys.prefix) if place in text]
