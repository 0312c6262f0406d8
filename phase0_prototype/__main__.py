"""`python -m phase0_prototype "def quicksort("`: the engine as of this phase, with tokens/s."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `generate`; a user's mistake is one line."""
    import typer

    from phase0_prototype.commands import generate

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(generate)
    try:
        app()
    except Exception as error:
        if not getattr(error, "is_user_error", False):
            raise
        print(f"phase0_prototype: {error}", file=sys.stderr)
        sys.exit(2)


main()
