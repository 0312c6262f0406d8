"""`titan start | check | hint | reset | progress | skip | card`: the learner's commands.

Imports stay light: this module is loaded for every `titan --help`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from module0_profiling import rooms

Phase = Annotated[str, typer.Argument(help="A phase, such as phase0.")]
Task = Annotated[str | None, typer.Argument(help="A task, such as 0.1.")]


def register(app: typer.Typer, root: Path | None = None) -> None:
    """Add the learner's commands to an app.

    Args:
        root: the repository that they work on; this one by default.
    """

    @app.command()
    @_one_line
    def start(phase: Phase, force: Annotated[bool, typer.Option(help="Overwrite changed files too.")] = False) -> None:
        """Copy the framework of a phase into workspace/; files that you changed stay."""
        from module0_profiling.course import workspace

        done = workspace.start(phase, force=force, root=root)
        typer.echo(f"{len(done.copied)} files copied into {done.folder}")
        if done.kept:
            typer.echo(f"kept as you changed them: {', '.join(done.kept)} (--force overwrites, with a backup)")
        _tell_backup(done.backup)
        short = rooms.phase(rooms.room(phase, root))
        typer.echo(f"next: read {rooms.room(phase, root)}/README.md, then make check-{short}")

    @app.command()
    @_one_line
    def check(
        phase: Phase,
        use: Annotated[str, typer.Option(help="Implementations, such as phase0=mine; IMPL=mine does the same.")] = "",
        only: Annotated[str, typer.Option(help="One gate or one task, by its number.")] = "",
        record: Annotated[bool, typer.Option(help="Write the figures to reports/results.")] = False,
        prove: Annotated[bool, typer.Option(help="Prove the course itself instead of grading.")] = False,
    ) -> None:
        """Grade a phase: exactness, then counts, then ratios. Status 0 passed, 1 failed, 3 nothing measurable here."""
        from module0_profiling.course import checking

        run = checking.prove(phase, root) if prove else checking.check(phase, use, only, record, root)
        raise typer.Exit(run)

    @app.command()
    @_one_line
    def hint(phase: Phase, task: Task = None) -> None:
        """Show the next hint for a task, or for the first gate that failed."""
        from module0_profiling.course import hints

        taken = hints.take(phase, task, root)
        again = " (the last one, again)" if taken.again else ""
        typer.echo(f"task {taken.hint.task}, hint {taken.hint.level} of {taken.of}{again}\n\n{taken.hint.text.strip()}")

    @app.command()
    @_one_line
    def reset(
        phase: Phase, part: Annotated[str | None, typer.Argument(help="A part, such as kv_cache.")] = None
    ) -> None:
        """Restore one part, or all, to the framework's version; yours is kept under workspace/.backup."""
        from module0_profiling.course import workspace

        done = workspace.reset(phase, part, root=root)
        typer.echo(f"restored: {', '.join(done.files)}" if done.files else "nothing to restore: no file differs")
        _tell_backup(done.backup)

    @app.command()
    @_one_line
    def progress() -> None:
        """Show the gates passed, failed and not measured, hints taken and skips of every phase."""
        from module0_profiling.course import checking

        checking.show_progress(root)

    @app.command()
    @_one_line
    def skip(
        phase: Phase, task: Task = None, undo: Annotated[bool, typer.Option(help="Take the mark back.")] = False
    ) -> None:
        """Mark a task or a phase as skipped; nothing depends on it."""
        from module0_profiling.course import progress as state

        what = state.skip(phase, task, undo=undo, root=root)
        typer.echo(f"{what} is {'no longer ' * undo}marked as skipped")

    @app.command()
    @_one_line
    def card() -> None:
        """Write your report card to workspace/report_card.md."""
        from module0_profiling.course import report_card

        typer.echo(f"written: {report_card.write(root)}")


def _tell_backup(folder: Path | None) -> None:
    if folder:
        typer.echo(f"your version is in {folder}")


def _one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Print a user's mistake as one line and exit with 2, instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (rooms.UnknownPhaseError, ValueError) as error:
            from module0_profiling.course.errors import CourseError

            if not isinstance(error, CourseError | rooms.UnknownPhaseError):
                raise
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None

    return wrapped
