"""`titan checkpoint SHAPE --out DIR`: a random checkpoint of a published shape, for speed work without downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `titan`."""
    app.command("checkpoint")(checkpoint)


def checkpoint(
    shape: Annotated[str | None, typer.Argument(help="Name of a shape; --list prints them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write, new or empty.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint in a directory in use.")] = False,
    list_shapes: Annotated[bool, typer.Option("--list", help="List the shapes and exit.")] = False,
) -> None:
    """Write a seeded random checkpoint of a published shape (for speed work; it generates noise)."""
    from phase0_prototype.checkpoint import SHAPES, checkpoint_bytes, write_checkpoint
    from phase0_prototype.config import parse_config
    from phase0_prototype.errors import UserError

    if list_shapes:
        for name, raw in SHAPES.items():
            size = checkpoint_bytes(parse_config(raw, source=name), "bfloat16") / 1e9
            typer.echo(f"{name:16} {size:6.1f} GB in bfloat16  {raw['architectures'][0]}")
        return
    if shape is None or out is None:
        raise UserError(f"give a shape and --out DIR; shapes: {', '.join(SHAPES)}")
    write_checkpoint(shape, out, seed=seed, dtype=dtype, force=force)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e9
    typer.echo(f"wrote {out} ({shape}, {dtype}, seed {seed}, {size:.2f} GB)")
