"""Run a room's notebooks and save them with their outputs: `python -m module0_profiling.notebooks phase0_prototype`.

The source of a notebook is a script of `# %%` cells (jupytext, percent format): that is what people read, review and
edit. The .ipynb beside it has the same cells with the outputs of the last run, and is written by this command only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from module0_profiling import rooms

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from pandas import DataFrame

TIMEOUT = 300  # seconds for one cell


def sources(room: str, root: Path | None = None) -> tuple[Path, ...]:
    """The scripts of a room's notebooks in the order in which they are read."""
    return tuple(sorted(((root or rooms.ROOT) / room / "notebooks").glob("[0-9]*.py")))


def read(source: Path) -> NotebookNode:
    """The notebook of a script, without outputs. Ids are the cells' numbers: random ones would change every file."""
    import jupytext  # type: ignore[import-untyped]

    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata.get("jupytext", {}).pop("text_representation", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.source = cell.source.strip(
            "\n"
        )  # a formatter wants two lines before a function of the script, not of a cell
    return notebook


def execute(source: Path, *, timeout: int = TIMEOUT, environment: dict[str, str] | None = None) -> NotebookNode:
    """Run a script's notebook from top to bottom in a kernel of this interpreter; returns it with its outputs.

    Args:
        source: the script; the kernel runs in its folder, as under JupyterLab.
        timeout: seconds for one cell.
        environment: variables that the kernel gets beside those of this process.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds it and its traceback.
        nbclient.exceptions.CellTimeoutError: a cell took longer than `timeout`.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = read(source)
    # No folder to look in: then "python3" is this interpreter, and not one that somebody registered under that name.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
        extra_arguments=["--log-level=ERROR"],
    )
    paths = [str(rooms.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # works without an installation too
    quiet = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONPATH": os.pathsep.join(paths)}
    client.execute(env={**os.environ, **quiet, **(environment or {})}, cleanup_kc=True)
    notebook.metadata.pop("language_info", None)  # it holds the version of Python: a change in every file
    return notebook


def save(notebook: NotebookNode, source: Path) -> Path:
    """Write a notebook beside its script; returns the path."""
    import nbformat

    path = source.with_suffix(".ipynb")
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return path


def drift(source: Path) -> str:
    """What the saved notebook has against its script or its outputs, in one line; empty when all is well."""
    import nbformat

    path = source.with_suffix(".ipynb")
    if not path.is_file():
        return f"{path.name} is missing"
    saved, wanted = nbformat.read(path, as_version=4), read(source)
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (saved, wanted)]
    if cells[0] != cells[1]:
        pairs = zip(*cells, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, cells)))
        return f"{path.name}: cell {first} is not that of {source.name}"
    code = [(i, cell) for i, cell in enumerate(saved.cells) if cell.cell_type == "code"]
    if not_run := [i for i, cell in code if cell.execution_count is None]:
        return f"{path.name}: cell {not_run[0]} has not been run"
    if failed := [i for i, cell in code if any(out.output_type == "error" for out in cell.outputs)]:
        return f"{path.name}: cell {failed[0]} ended with an error"
    return ""


def table(frame: DataFrame, formats: Mapping[str, str]) -> DataFrame:
    """A pandas table as text for a notebook: each column by its format ("{:.2f}"), what is missing left empty.

    A `Styler` would do it too, but its output holds an address, which makes every saved notebook a new file.
    """

    def written(column: str) -> list[str]:
        known = frame[column].notna()
        return [formats.get(column, "{}").format(x) if k else "" for x, k in zip(frame[column], known, strict=True)]

    return frame.assign(**{column: written(column) for column in frame.columns})


def main(arguments: list[str] | None = None) -> int:
    """Run and save the notebooks of a room, or those whose names begin with one of `names`."""
    parser = argparse.ArgumentParser(prog="python -m module0_profiling.notebooks", description=__doc__)
    parser.add_argument("room", help="phase0_prototype, or phase0")
    parser.add_argument("names", nargs="*", help="beginnings of names, as in 01; default: all")
    parser.add_argument("--check", action="store_true", help="run nothing: say which saved notebooks are out of date")
    options = parser.parse_args(arguments)
    try:
        room = rooms.room(options.room)
        import jupytext  # noqa: F401
        import nbclient
    except rooms.UnknownPhaseError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"notebooks need {error.name}: pip install 'titaninfer[notebooks]'")
    chosen = [s for s in sources(room) if not options.names or s.name.startswith(tuple(options.names))]
    if not chosen:
        return _fail(f"{room} has no such notebook: it has {', '.join(s.stem for s in sources(room)) or 'none'}")
    if options.check:
        found = [problem for source in chosen if (problem := drift(source))]
        return _fail(f"{'; '.join(found)}: run python -m module0_profiling.notebooks {room}") if found else 0
    for source in chosen:
        print(f"running {source.relative_to(rooms.ROOT)} ...", flush=True)
        try:
            print(f"wrote {save(execute(source), source).relative_to(rooms.ROOT)}")
        except (nbclient.exceptions.CellExecutionError, nbclient.exceptions.CellTimeoutError) as error:
            return _fail(f"{source.name} did not run to its end, nothing was saved\n{error}")
    return 0


def _fail(message: Any) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
