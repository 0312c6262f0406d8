"""The notebooks of phase 0: they run from top to bottom, and what is saved is what their scripts say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from module0_profiling import notebooks, rooms

for library in ("jupytext", "nbclient", "nbformat", "ipykernel", "matplotlib", "pandas"):
    pytest.importorskip(library, reason=f"notebooks need {library}: pip install 'titaninfer[notebooks]'")

SOURCES = notebooks.sources("phase0_prototype")
# Beside other tests, threads of tiny tensors only wait for each other; torch.compile takes a minute and has its tests.
QUICK = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def _text(cell: dict) -> str:
    """What a code cell printed, as plain text."""
    pieces = [out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return "".join(pieces)


def test_there_are_two() -> None:
    assert [source.stem for source in SOURCES] == ["01_from_recompute_to_cache", "02_memory_and_the_gpu"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_runs_from_top_to_bottom_and_its_exact_predictions_hold(source: Path) -> None:
    notebook = notebooks.execute(source, timeout=300, environment=QUICK)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "\n".join(_text(cell) for cell in code)
    assert all(cell.execution_count for cell in code)
    assert "prediction is wrong" not in printed and "wrong at n" not in printed
    assert "every prediction is exact" in printed or "NOT MEASURED HERE" in printed


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_saved_notebook_is_that_of_its_script_and_was_run_without_error(source: Path) -> None:
    assert notebooks.drift(source) == ""


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_saved_outputs_name_no_folder_of_the_machine_that_made_them(source: Path) -> None:
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not [place for place in (str(rooms.ROOT), str(Path.home()) + "/", sys.prefix) if place in text]


SCRIPT = "# %% [markdown]\n# # A title\n\n# %%\nprint(6 * 7)\n"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A script whose notebook has been run and saved."""
    source = tmp_path / "01_example.py"
    source.write_text(SCRIPT)
    notebooks.save(notebooks.execute(source), source)
    return source


def test_a_saved_notebook_holds_outputs_and_matches_its_script(saved: Path) -> None:
    assert notebooks.drift(saved) == ""
    assert "42" in saved.with_suffix(".ipynb").read_text()


def test_blank_lines_that_a_formatter_puts_before_a_function_are_not_part_of_its_cell(tmp_path: Path) -> None:
    source = tmp_path / "01_example.py"
    source.write_text("# %%\n\n\ndef answer():\n    return 42\n")
    assert [cell.source for cell in notebooks.read(source).cells] == ["def answer():\n    return 42"]


def test_running_twice_writes_the_same_file(saved: Path) -> None:
    before = saved.with_suffix(".ipynb").read_bytes()
    notebooks.save(notebooks.execute(saved), saved)
    assert saved.with_suffix(".ipynb").read_bytes() == before


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        ((SCRIPT, SCRIPT.replace("6 * 7", "7 * 7")), "cell 1 is not that of"),
        ((SCRIPT, SCRIPT + "\n# %%\nprint(1)\n"), "cell 2 is not that of"),
        (('"execution_count": 1', '"execution_count": null'), "cell 1 has not been run"),
        (('"output_type": "stream"', '"output_type": "error"'), "cell 1 ended with an error"),
    ],
    ids=["edited", "longer", "not run", "failed"],
)
def test_drift_is_noticed(saved: Path, edit: tuple[str, str], complaint: str) -> None:
    before, after = edit
    for file in (saved, saved.with_suffix(".ipynb")):
        if before in file.read_text():
            file.write_text(file.read_text().replace(before, after))
            break
    assert complaint in notebooks.drift(saved)


def test_a_missing_notebook_is_drift(tmp_path: Path) -> None:
    (tmp_path / "01_example.py").write_text(SCRIPT)
    assert notebooks.drift(tmp_path / "01_example.py") == "01_example.ipynb is missing"


def test_a_failing_cell_raises_and_a_room_without_notebooks_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nbclient.exceptions import CellExecutionError

    source = tmp_path / "01_broken.py"
    source.write_text("# %%\n1 / 0\n")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(source)
    assert notebooks.main(["phase0", "99"]) == 1
    assert capsys.readouterr().err.startswith("error: phase0_prototype has no such notebook: it has 01_from")
