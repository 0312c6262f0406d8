"""Nothing in this phase can run code that came in a message: a lint over its syntax trees, and a check of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parents[1]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing"}
CALLS = {"recv_pyobj", "send_pyobj", "recv_serialized", "eval", "exec"}
DOTTED = {"torch.load", "torch.save", "torch.multiprocessing", "numpy.load", "np.load", "yaml.load"}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in MODULES]
                found += [name.name for name in names if name.name in DOTTED]
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES:
                    found.append(module)
                found += [f"{module}.{n.name}" for n in names if f"{module}.{n.name}" in DOTTED]
            case ast.Attribute(attr=attribute) if ast.unparse(node) in DOTTED or attribute in CALLS - {"eval", "exec"}:
                found.append(ast.unparse(node))
            case ast.Call(func=ast.Name(id=name)) if name in CALLS or name == "__import__":
                found.append(name)
    return found


def test_no_file_of_this_phase_unpickles_or_evaluates():
    files = [path for path in ROOM.rglob("*.py") if "tests" not in path.parts]
    assert len(files) > 15
    assert {str(path): found for path in files if (found := offences(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import multiprocessing.shared_memory",
        "from dill import loads",
        "from torch import load",
        "socket.recv_pyobj()",
        "torch.load(f)",
        "eval(text)",
    ],
)
def test_the_lint_finds_each_kind(source):
    assert offences(source)


@pytest.mark.parametrize(
    "module",
    [
        "phase4_scheduler.async_llm",
        "phase4_scheduler.core.supervisor",
        "phase4_scheduler.core.main",
        "phase4_scheduler.core.core",
        "phase4_scheduler.null_engine",
    ],
)
def test_the_client_and_the_engine_without_a_model_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
