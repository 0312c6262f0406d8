"""The notebooks of phase 3: they run from top to bottom, their predictions hold, and what is saved is what they say.

Each section ends in assertions of its own, which fail the cell. Here it is that nothing was left out, and that what a
reader of the saved notebooks sees is right.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from module0_profiling import notebooks, rooms

for library in ("jupytext", "nbclient", "nbformat", "ipykernel", "matplotlib", "pandas"):
    pytest.importorskip(library, reason=f"notebooks need {library}: pip install 'titaninfer[notebooks]'")

SOURCES = notebooks.sources("phase3_paged_attention")
QUICK = {"OMP_NUM_THREADS": "1"}  # beside other tests, threads of tiny tensors only wait for each other
TRITON = importlib.util.find_spec("triton") is not None
CONCLUSIONS = {  # one or more of each section, in order
    "01_the_ladder": (
        "framework: reads 6.19 x the bytes of the tokens that there are",
        "solution: reads 1.17 x the bytes of the tokens that there are",
        "by bytes the step's attention should shrink 5.3 x",
        "32 ragged: the solution is",
        "times that each key is asked for: naive 8 online 4 tiled 4 packed 1 split 1",
        "PyTorch written out moves 11.1 x what the packed kernel asks for",
        "PREDICTION, not measured, 64 x 8k: floor 500 µs",
        "PREDICTION, not measured, 1 x 128k: floor 125 µs",
        "an even share is 4,710 tokens; the busiest has 33,450, split 4,",
        "64 even sequences are never split",
        "CPU, ragged batch: reads 5.64 x what it needs",
        "the busiest program has 7.10 x its share",
    ),
    "02_smaller_numbers": (
        "numbers of e4m3 and e5m2: 253 247 as predicted",
        "of 61 tokens that see the infinite key 29 attend to NaN; clamped, none does",
        "e4m3: predicted 2.45%, found 2.6",
        "and the error is not yet doubled: e4m3 4096 x e5m2 16384 x int8 1 x",
        "noise of e5m2 over that of e4m3:",
        "every prediction is exact: 4,096, 2,048, 2,048 and 2,176 bytes",
        "an entry: 1,152 bytes, packed 656: 1.76 x fewer",
        "ridge: bf16 97.3 heads FP8 55.4 heads",
        "FP8 is faster by: 1.75 x with 16 heads 1.00 x with 128 heads",
    ),
}
TRACED = {  # where Triton interprets and compiles
    "01_the_ladder": (
        "every rung agrees with float64; every prediction is exact, and so is the model of all tensors",
        "no rung spills; loads go on in the background in packed, split, page_rows",
        "kernel: K and V 6.00 x in a decode",
    ),
    "02_smaller_numbers": (
        "solution: 0 operations of torch, 1.00 x the fewest bytes",
        "framework: 34,816 bytes a cached token, 30.2 x an entry",
        "solution: 1,152 bytes a cached token, 1.0 x an entry",
        "latents: 30.2 x an entry",
    ),
}
PICTURES = {"01_the_ladder": 4, "02_smaller_numbers": 3}
TIMED_ON_A_GPU = {"01_the_ladder": "5", "02_smaller_numbers": ""}  # sections that have no conclusion elsewhere

each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(notebook: Any) -> str:
    """What the code cells printed, as plain text."""
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    return "\n".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in outputs)


def test_there_are_two() -> None:
    assert [source.stem for source in SOURCES] == list(CONCLUSIONS)


@each
def test_it_runs_from_top_to_bottom_and_comes_to_every_conclusion(source: Path) -> None:
    notebook = notebooks.execute(source, timeout=300, environment=QUICK)
    assert all(cell.execution_count for cell in _code(notebook))
    printed = _printed(notebook)
    places = [printed.find(conclusion) for conclusion in CONCLUSIONS[source.stem]]
    assert -1 not in places, CONCLUSIONS[source.stem][places.index(-1)]
    assert places == sorted(places)
    assert [traced for traced in TRACED[source.stem] if (traced in printed) != TRITON] == []
    assert ("they need an NVIDIA GPU" in printed) != torch.cuda.is_available()
    assert ("Triton is not installed" in printed) != TRITON


@each
def test_the_saved_notebook_is_that_of_its_script_and_was_run_without_error(source: Path) -> None:
    assert notebooks.drift(source) == ""


@each
def test_the_saved_notebook_shows_conclusions_and_pictures(source: Path) -> None:
    import nbformat

    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    printed = _printed(notebook)
    wanted = (*CONCLUSIONS[source.stem], *TRACED[source.stem])
    assert [conclusion for conclusion in wanted if conclusion not in printed] == []
    outputs = [out for cell in _code(notebook) for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == PICTURES[source.stem]
    assert not [out.text for out in outputs if out.get("name") == "stderr"]


@each
def test_every_section_predicts_and_asserts_its_conclusion(source: Path) -> None:
    sections = source.read_text(encoding="utf-8").split("\n# ## ")[1:]
    assert [section[0] for section in sections] == [*"12345", "Y"]
    silent = [section[0] for section in sections[:5] if "assert " not in section]
    assert "".join(silent) == TIMED_ON_A_GPU[source.stem]
    assert [section[:2] for section in sections[:5] if "**Predict" not in section] == []


@each
def test_what_a_gpu_would_take_is_marked_as_a_prediction(source: Path) -> None:
    import nbformat

    cells = _code(nbformat.read(source.with_suffix(".ipynb"), as_version=4))
    reckoned = [cell for cell in cells if "4.3e12" in cell.source]
    assert len(reckoned) == 1 and "PREDICTION" in reckoned[0].source


@each
def test_saved_outputs_name_no_folder_of_the_machine_that_made_them(source: Path) -> None:
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not [place for place in (str(rooms.ROOT), str(Path.home()) + "/", sys.prefix) if place in text]
