"""The `titan` commands of phase 1: `simulate` and `memory-map`; `generate` and `demo` run this engine by themselves."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to `titan`."""
    from phase1_memory import simulate_commands

    simulate_commands.register(app)
