"""The `titan` command: collects what every room offers.

A room takes part by having a `commands.py` with `register(app)`. Rooms are read in order, so a later phase may replace
an earlier phase's command by registering the same name (`generate` always runs the newest engine). Nothing imported
here may import torch: `titan --help` answers at once.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of `titan`. A user's mistake is one line on stderr and exit status 2."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from module0_profiling import __version__

        print(f"titan {__version__}")
        return
    try:
        make_app()()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if getattr(error, "is_user_error", False):
            print(f"titan: {error}", file=sys.stderr)
            sys.exit(2)
        raise


def make_app():  # type: ignore[no-untyped-def]  # the return type would import typer for --version
    """The typer application with every room's commands."""
    import importlib
    import importlib.util

    import typer

    from module0_profiling import rooms

    app = typer.Typer(
        name="titan",
        help="TitanInfer: a course that is an inference engine.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def options(version: bool = typer.Option(False, "--version", help="print the version and stop")) -> None:
        if version:
            from module0_profiling import __version__

            print(f"titan {__version__}")
            raise typer.Exit

    for room in rooms.discover():
        if importlib.util.find_spec(f"{room}.commands"):
            importlib.import_module(f"{room}.commands").register(app)
    names = [c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands]
    app.registered_commands = [c for i, c in enumerate(app.registered_commands) if names[i] not in names[i + 1 :]]
    return app
