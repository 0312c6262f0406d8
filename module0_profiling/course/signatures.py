"""Framework and solution must agree: public names, parameters, defaults, annotations, bases, dataclass fields."""

from __future__ import annotations

import ast
from pathlib import Path

from module0_profiling import rooms
from module0_profiling.course import csource, gates
from module0_profiling.course.marks import Def
from module0_profiling.course.parts import framework_of, package_of

# Decorators that change how a name is used. Others (torch.compile, inference_mode) may be the very thing to learn.
INTERFACE = ("property", "staticmethod", "classmethod", "abstractmethod", "setter", "dataclass")


def problems(room: str, root: Path | None = None) -> list[str]:
    """Differences between the public interfaces of a room's framework and its solution, one line each.

    What both define must be alike. What only one defines must be private, or listed at the top of gates.toml, as in
    `solution_only = ["kv_cache.Page"]`, which speaks for the members of a class too. A .cu file of the solution may
    have kernels of its own: the steps of its ladder.
    """
    home = framework_of(room, root)
    allowed = {side: set(gates.one_sided(room, side, root)) for side in ("framework", "solution")}
    found = []
    for path in sorted(home.rglob("*")):
        if path.suffix not in (".py", ".cu") or path.name.startswith("__"):
            continue
        relative = path.relative_to(home)
        solution = package_of(room, root) / relative
        short = f"{rooms.phase(room)} {relative}"
        if not solution.is_file():
            found.append(f"{short}: the framework has it, the solution does not")
            continue
        read = interface if path.suffix == ".py" else cuda_interface
        ours, theirs = read(path.read_text(encoding="utf-8")), read(solution.read_text(encoding="utf-8"))
        part = ".".join(relative.with_suffix("").parts)
        lines = _changed(ours, theirs) + _alone(ours, theirs, part, "framework", allowed["framework"])
        if path.suffix == ".py":
            lines += _alone(theirs, ours, part, "solution", allowed["solution"])
        found += [f"{short}: {line}" for line in lines]
    return found


def interface(text: str) -> dict[str, str]:
    """Public functions, methods, classes and annotated class fields of Python source: qualified name -> signature."""
    found: dict[str, str] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, Def) and _public(node.name):
                found[prefix + node.name] = _function(node)
            elif isinstance(node, ast.ClassDef) and _public(node.name):
                bases = ", ".join(ast.unparse(base) for base in (*node.bases, *node.keywords))
                found[prefix + node.name] = f"{_decorators(node)}class({bases})"
                walk(node.body, f"{prefix}{node.name}.")
            elif prefix and isinstance(node, ast.AnnAssign) and _public(ast.unparse(node.target)):
                default = f" = {ast.unparse(node.value)}" if node.value else ""
                found[prefix + ast.unparse(node.target)] = f"{ast.unparse(node.annotation)}{default}"

    walk(ast.parse(text).body, "")
    return found


def cuda_interface(text: str) -> dict[str, str]:
    """Kernels of CUDA C++ source: name -> parameters."""
    kernels = (function for function in csource.functions(text).values() if function.kernel)
    return {kernel.name: f"({', '.join(kernel.parameters)})" for kernel in kernels}


def _changed(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    both = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    return [f"{name}{ours[name]} in the framework, {name}{theirs[name]} in the solution" for name in both]


def _alone(here: dict[str, str], there: dict[str, str], part: str, side: str, allowed: set[str]) -> list[str]:
    found = []
    for name in here:
        owners = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
        listed = any(f"{part}.{owner}" in allowed for owner in (*owners, name))
        told = any(owner not in there for owner in owners)  # the class was reported, or listed
        if name not in there and not listed and not told:
            found.append(f"{name} is public in the {side} only: make it private or list {part}.{name} in {side}_only")
    return found


def _function(node: Def) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{_decorators(node)}({ast.unparse(node.args)}){returns}"


def _decorators(node: Def | ast.ClassDef) -> str:
    written = [ast.unparse(decorator) for decorator in node.decorator_list]
    names = [text.partition("(")[0].rpartition(".")[2] for text in written]
    kept = [text for text, name in zip(written, names, strict=True) if name in INTERFACE]
    return "".join(f" @{text} " for text in kept)


def _public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__", "__len__", "__getitem__")
