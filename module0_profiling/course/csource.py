"""Just enough of CUDA C++ to compare functions: comments out, one name, one parameter list, one body."""

from __future__ import annotations

import re
from dataclasses import dataclass

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
FUNCTION = re.compile(
    r"\b(__global__|__device__|__host__)[^;{}()]*?(?:__launch_bounds__\([^)]*\)[^;{}()]*?)?\b(\w+)\s*\(([^)]*)\)\s*\{"
)
NOT_IN_PARAMETERS = re.compile(r"\s*\b(__restrict__|__restrict)\b\s*")


@dataclass(frozen=True)
class Function:
    """A kernel or device function.

    Attributes:
        kernel: declared `__global__`, hence part of the interface.
        parameters: types and names with blanks made equal, without `__restrict__`.
        body: lines without comments and with blanks made equal; lines of brackets only are left out.
        first, last: line numbers in the file, from 1.
    """

    name: str
    kernel: bool
    parameters: tuple[str, ...]
    body: tuple[str, ...]
    first: int
    last: int


def functions(text: str) -> dict[str, Function]:
    """The functions of a .cu file by name. Templates and overloads are told apart by nothing: the last one counts."""
    bare = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)  # same length, same lines
    found = {}
    for match in FUNCTION.finditer(bare):
        end = _closing(bare, match.end() - 1)
        parameters = tuple(_even(NOT_IN_PARAMETERS.sub(" ", item)) for item in match[3].split(",") if item.strip())
        body = tuple(line for line in map(_even, bare[match.end() : end].splitlines()) if re.search(r"\w", line))
        first, last = bare.count("\n", 0, match.start()) + 1, bare.count("\n", 0, end) + 1
        found[match[2]] = Function(match[2], match[1] == "__global__", parameters, body, first, last)
    return found


def comments(text: str) -> list[tuple[int, str]]:
    """(line, text) of every comment line."""
    found = []
    for match in COMMENT.finditer(text):
        first = text.count("\n", 0, match.start()) + 1
        found += [(first + index, line.strip("/* \t")) for index, line in enumerate(match[0].splitlines())]
    return found


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def _even(text: str) -> str:
    return re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text.strip()))
