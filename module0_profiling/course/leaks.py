"""No answer in the framework: four rules, each proven to fire by a test.

1. A function with a TASK mark differs from the solution's function of that name.
2. No function of the framework holds a run of statements of an answer. An answer is the solution's version of a marked
   function, or a function that only the solution has. Local names do not matter: both sides are renamed in order of
   appearance. What stands before the mark in a marked function is given, so it may be shared.
3. No comment or docstring holds lines of an answer, and none points at the solution.
4. No import of the solution's parts, save for annotations (`if TYPE_CHECKING:`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.course import csource, marks
from module0_profiling.course.marks import Def
from module0_profiling.course.parts import available, framework_of, package_of

RUN = 4  # statements in a row
WEIGHT = 45  # syntax nodes in such a run: `self.a = a` four times is no answer
COMMENT_RUN = 2  # commented-out lines in a row
CUDA_RUN = 6  # lines in a row


def problems(room: str, root: Path | None = None) -> list[str]:
    """Every leak found in the framework of a room, one line each."""
    home, package = framework_of(room, root), package_of(room, root)
    found = list(_same_functions(home, package))
    found += _shared_runs(home, package)
    found += _in_comments(room, home, package, root)
    found += _imports(room, home, root)
    return [f"{rooms.phase(room)} framework/{line}" for line in found]


def _same_functions(home: Path, package: Path) -> Iterator[str]:
    for file, names in _marked(home).items():
        if not (package / file).is_file():
            continue  # signatures.py says so
        ours, theirs = _bodies(home / file), _bodies(package / file)
        for name in sorted(names):
            if name in theirs and ours.get(name) == theirs[name]:
                yield f"{file}: {name} holds a TASK, yet it equals the solution"


def _shared_runs(home: Path, package: Path) -> Iterator[str]:
    answers = _answers(home, package)
    known = {
        run: f"{file}: {name}"
        for file, functions in answers.items()
        for name, node in functions.items()
        for run in _runs(node.body)
    }
    for path in _python(home):
        text = path.read_text(encoding="utf-8")
        relative = path.relative_to(home)
        first_mark: dict[str, int] = {}
        for mark in marks.find(home):
            if mark.file == relative:
                first_mark.setdefault(mark.function, mark.line)
        for name, node in marks.python_functions(text).items():
            shared = [known[run] for run in _runs(node.body, first_mark.get(name, 0)) if run in known]
            if shared:
                yield f"{relative}: {name} holds {RUN} statements in a row of the solution's {shared[0]}"
    yield from _shared_cuda_runs(home, package)


def _shared_cuda_runs(home: Path, package: Path) -> Iterator[str]:
    for path in sorted(home.rglob("*.cu")):
        file = path.relative_to(home)
        if not (package / file).is_file():
            continue
        marked = _marked(home).get(file, set())
        ours = csource.functions(path.read_text(encoding="utf-8"))
        theirs = csource.functions((package / file).read_text(encoding="utf-8"))
        given = {run for name, it in theirs.items() if name in ours and name not in marked for run in _cuda_runs(it)}
        answers = {run for name, it in theirs.items() if name not in ours or name in marked for run in _cuda_runs(it)}
        for name, function in ours.items():
            if any(run in answers - given for run in _cuda_runs(function)):
                yield f"{file}: {name} holds {CUDA_RUN} lines in a row of the solution"


def _cuda_runs(function: csource.Function) -> list[tuple[str, ...]]:
    return [function.body[index : index + CUDA_RUN] for index in range(len(function.body) - CUDA_RUN + 1)]


def _undocumented(node: Def) -> Def:
    """A copy without its docstring, which framework and solution may share."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    copy = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(copy, Def)
    copy.body = body or [ast.Pass()]
    return copy


def _in_comments(room: str, home: Path, package: Path, root: Path | None) -> Iterator[str]:
    answers = _answers(home, package)
    lines = {
        _even(line)
        for functions in answers.values()
        for node in functions.values()
        for line in ast.unparse(_undocumented(node)).splitlines()[1:]
    }
    lines = {line for line in lines if len(line) >= 12}
    parts = "|".join(re.escape(part.replace(".", "/")) for part in available(room, root))
    points = re.compile(rf"\b{room}[./](?:{parts})\b|\.\./(?:{parts})\.(?:py|cu)\b|\bthe solution\b", re.IGNORECASE)
    for path in sorted(home.rglob("*")):
        if path.suffix not in (".py", ".cu"):
            continue
        text, relative = path.read_text(encoding="utf-8"), path.relative_to(home)
        prose = marks.python_comments(text) + _docstrings(text) if path.suffix == ".py" else csource.comments(text)
        for line, words in prose:
            pointer = points.search(words)
            if pointer:
                yield f"{relative}:{line}: points at the solution ({pointer[0]})"
        streak = 0
        for line, words in prose:
            streak = streak + 1 if _even(_reprinted(words)) in lines else 0
            if streak == COMMENT_RUN:
                yield f"{relative}:{line}: {COMMENT_RUN} lines of the solution in a comment"


def _imports(room: str, home: Path, root: Path | None) -> Iterator[str]:
    parts = set(available(room, root))
    for path in _python(home):
        where = path.relative_to(home)
        for node in _imports_that_run(ast.parse(path.read_text(encoding="utf-8"))):
            for module in _modules(node):
                part = module.removeprefix(f"{room}.") if module.startswith(f"{room}.") else ""
                if part in parts:
                    yield f"{where}:{node.lineno}: imports the solution {module}: write a relative import"
                elif part.startswith("framework."):
                    yield f"{where}:{node.lineno}: imports {module}: the learner's copy needs a relative import"


def _imports_that_run(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return  # names for annotations are no answer
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _imports_that_run(child)


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _answers(home: Path, package: Path) -> dict[Path, dict[str, Def]]:
    """The solution's marked functions, and those that only the solution has, by file and name."""
    marked, found = _marked(home), {}
    for path in _python(home):
        file = path.relative_to(home)
        if (package / file).is_file():
            ours = marks.python_functions(path.read_text(encoding="utf-8"))
            theirs = marks.python_functions((package / file).read_text(encoding="utf-8"))
            found[file] = {
                name: node for name, node in theirs.items() if name not in ours or name in marked.get(file, ())
            }
    return found


def _marked(home: Path) -> dict[Path, set[str]]:
    found: dict[Path, set[str]] = {}
    for mark in marks.find(home):
        if mark.function:
            found.setdefault(mark.file, set()).add(mark.function)
    return found


def _bodies(path: Path) -> dict[str, str | tuple[str, ...]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".cu":
        return {name: function.body for name, function in csource.functions(text).items()}
    return {name: _canonical(_without_docstring(node.body)) for name, node in marks.python_functions(text).items()}


def _runs(body: list[ast.stmt], after: int = 0) -> Iterator[str]:
    """Canonical text of every RUN statements in a row, at any depth, that start after a line."""
    body = _without_docstring(body)
    for index in range(len(body) - RUN + 1):
        run = body[index : index + RUN]
        if run[0].lineno > after and sum(1 for statement in run for _ in ast.walk(statement)) >= WEIGHT:
            yield _canonical(run)
    for statement in body:
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if inner and not isinstance(statement, Def):  # nested functions are listed by themselves
                yield from _runs(inner, after)


def _canonical(statements: list[ast.stmt]) -> str:
    names: dict[str, str] = {}
    tree = ast.parse(ast.unparse(ast.Module(body=statements, type_ignores=[])))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.setdefault(node.id, f"n{len(names)}")
        elif isinstance(node, ast.arg):
            node.arg = names.setdefault(node.arg, f"n{len(names)}")
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_text else body


def _docstrings(text: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | Def) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            words = ast.get_docstring(node, clean=False) or ""
            found += [(first.lineno + index, line.strip()) for index, line in enumerate(words.splitlines())]
    return found


def _reprinted(words: str) -> str:
    """Commented-out code as ast.unparse writes it, so that spelling does not hide it."""
    for candidate in (words, words + "\n    pass"):
        try:
            return ast.unparse(ast.parse(candidate.strip())).splitlines()[0]
        except (SyntaxError, IndexError, ValueError):
            continue
    return words


def _even(line: str) -> str:
    return re.sub(r"\s+", " ", line.strip())


def _python(home: Path) -> list[Path]:
    return sorted(home.rglob("*.py"))
