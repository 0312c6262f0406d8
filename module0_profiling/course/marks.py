"""The `# TASK 0.1` marks of a framework (`// TASK 0.1` in CUDA C++), and the functions that they stand in."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

from module0_profiling.course import csource

MARK = re.compile(r"\bTASK\s+(\d+\.\d+)\b")
Def = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Mark:
    """A mark.

    Attributes:
        task: `0.1`.
        file: path relative to the framework.
        line: from 1.
        function: qualified name of the function that holds it, or that follows it; empty when there is none.
    """

    task: str
    file: Path
    line: int
    function: str


def find(framework: Path) -> list[Mark]:
    """Every mark in the .py and .cu files of a framework, by file and line."""
    found = []
    for path in sorted(framework.rglob("*")):
        if path.suffix not in (".py", ".cu"):
            continue
        text = path.read_text(encoding="utf-8")
        spans = _python_spans(text) if path.suffix == ".py" else _cuda_spans(text)
        comments = python_comments(text) if path.suffix == ".py" else csource.comments(text)
        for line, comment in comments:
            found += [
                Mark(task, path.relative_to(framework), line, _holder(spans, line)) for task in MARK.findall(comment)
            ]
    return found


def python_comments(text: str) -> list[tuple[int, str]]:
    """(line, text) of every comment of Python source."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string.lstrip("# \t")) for token in tokens if token.type == tokenize.COMMENT]


def python_functions(text: str) -> dict[str, Def]:
    """Functions and methods by qualified name (`KVCache.append`)."""
    found: dict[str, Def] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Def):
                found[prefix + child.name] = child
            if isinstance(child, Def | ast.ClassDef):
                walk(child, f"{prefix}{child.name}.")
            elif not isinstance(child, ast.expr):
                walk(child, prefix)

    walk(ast.parse(text), "")
    return found


def _python_spans(text: str) -> list[tuple[int, int, str]]:
    found, lines = [], text.splitlines()
    for name, node in python_functions(text).items():
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        last = node.end_lineno or first
        while last < len(lines) and _is_comment_within(lines[last], node.col_offset):
            last += 1  # the syntax tree knows no comments, so a function ends before those at its end
        found.append((first, last, name))
    return found


def _is_comment_within(line: str, column: int) -> bool:
    return line.lstrip().startswith("#") and len(line) - len(line.lstrip()) > column


def _cuda_spans(text: str) -> list[tuple[int, int, str]]:
    return [(function.first, function.last, function.name) for function in csource.functions(text).values()]


def _holder(spans: list[tuple[int, int, str]], line: int) -> str:
    inside = [span for span in spans if span[0] <= line <= span[1]]
    if inside:
        return max(inside)[2]  # the innermost starts last
    after = [span for span in spans if span[0] > line]
    return min(after)[2] if after else ""
