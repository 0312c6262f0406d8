"""Import the learner's files as `workspace.<room>.<part>`, and notice when they were edited.

The package `workspace.<room>` is made here: its search path is the learner's folder, then the framework's. So a part
that the learner does not have comes from the framework, also when a sibling asks for it with `from .model import
Model`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

WORKSPACE = "workspace"


def load(room: str, part: str, homes: tuple[Path, ...]) -> ModuleType:
    """The module of a part, from the first of the homes that has it.

    Loaded modules are kept until one of their files changes; then the whole room is loaded again, because its modules
    hold on to each other's classes.

    Args:
        room: package of the phase.
        part: module name relative to the homes, dotted when nested (`kernels.matmul`).
        homes: folders to search, the learner's first.

    Raises:
        Exception: whatever the file raises while it is imported.
    """
    package = f"{WORKSPACE}.{room}"
    if _is_stale(package, homes):
        _forget(package)
    if package not in sys.modules:
        _make_packages(room, homes)
    importlib.invalidate_caches()
    before = set(sys.modules)
    try:
        with _no_bytecode():
            module = importlib.import_module(f"{package}.{part}")
    except BaseException:
        _forget(package)  # half-imported siblings must not survive
        raise
    for name in set(sys.modules) - before:
        if name.startswith(f"{package}."):
            _stamp(sys.modules[name])
    return module


def _make_packages(room: str, homes: tuple[Path, ...]) -> None:
    folders = {Path()}
    for home in homes:
        folders |= {path.relative_to(home).parent for path in home.rglob("*.py")}
        folders |= {above for folder in list(folders) for above in folder.parents}
    top = sys.modules.setdefault(WORKSPACE, ModuleType(WORKSPACE))
    if not hasattr(top, "__path__"):
        top.__path__ = []
    for folder in sorted(folders):
        name = ".".join((WORKSPACE, room, *folder.parts))
        package = ModuleType(name, "Made by module0_profiling.course.loader from the learner's folder.")
        paths = [str(home / folder) for home in homes]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.__spec__.submodule_search_locations = paths
        package.__path__ = paths
        package.__package__ = name
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, package)


def _is_stale(package: str, homes: tuple[Path, ...]) -> bool:
    made = sys.modules.get(package)
    if made is None:
        return False
    if list(made.__path__) != [str(home) for home in homes]:
        return True
    return any(_changed(module, package, homes) for module in _members(package))


def _changed(module: ModuleType, package: str, homes: tuple[Path, ...]) -> bool:
    loaded = getattr(module, "__stamp__", None)
    if loaded is None:
        return False  # a package made above
    relative = Path(*module.__name__.removeprefix(f"{package}.").split(".")).with_suffix(".py")
    now = next((home / relative for home in homes if (home / relative).is_file()), None)
    return now is None or _stamp_of(now) != loaded


def _stamp(module: ModuleType) -> None:
    if module.__file__:
        module.__stamp__ = _stamp_of(Path(module.__file__))  # type: ignore[attr-defined]


def _stamp_of(path: Path) -> tuple[str, int, int]:
    facts = path.stat()
    return str(path), facts.st_mtime_ns, facts.st_size


def _members(package: str) -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


@contextmanager
def _no_bytecode() -> Iterator[None]:
    # A .pyc is trusted when second and size of its source agree: an edit or a reset within a second would go unnoticed.
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
