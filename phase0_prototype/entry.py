"""`python -m phaseN_name "prompt"`: `titan generate` with the engine of that phase, beside that of the phase before."""

from __future__ import annotations

import sys

from module0_profiling import rooms


def main(phase: str) -> None:
    """Run `generate` with the arguments of this process; a user's mistake is one line."""
    import typer

    from phase0_prototype.commands import generate

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(generate)
    try:
        app([*sys.argv[1:], "--phase", phase, "--beside"])
    except Exception as error:
        if not getattr(error, "is_user_error", False):
            raise
        print(f"{rooms.room(phase)}: {error}", file=sys.stderr)
        sys.exit(2)
