"""Errors that a learner sees: one line with the cause, the value and the remedy, never a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path


class CourseError(ValueError):
    """A mistake of the user, or of a course file; its text is the one line to print."""

    is_user_error = True  # `titan` prints it as one line


class CannotMeasure(CourseError):
    """What a measure needs is not here, and only the measure knows: neither passed nor failed. The text says what."""


class LearnerCodeError(CourseError):
    """The learner's file does not load; the text is `file:line: error`."""


def blame(error: BaseException, folders: tuple[Path, ...], root: Path) -> str:
    """One line for an exception: where in `folders` (else anywhere) it was raised, its type and its message.

    Args:
        error: the exception, with its traceback.
        folders: whose code is to blame first; the innermost frame inside the first folder that has one is named.
        root: paths are printed relative to it.
    """
    what = f"{type(error).__name__}: {_first_line(error)}"
    if isinstance(error, SyntaxError) and error.filename:
        what = f"{type(error).__name__}: {error.msg}"
        return f"{_short(error.filename, root)}:{error.lineno}: {what}"
    frames = traceback.extract_tb(error.__traceback__)
    for folder in folders:
        inside = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
        if inside:
            return f"{_short(inside[-1].filename, root)}:{inside[-1].lineno}: {what}"
    if frames:
        return f"{_short(frames[-1].filename, root)}:{frames[-1].lineno}: {what}"
    return what


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _short(filename: str, root: Path) -> str:
    path = Path(filename)
    return str(path.relative_to(root)) if path.is_relative_to(root) else filename
