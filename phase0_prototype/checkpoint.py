"""Seeded random checkpoints of published shapes, for speed work without downloads.

Speed depends on shapes and dtypes, hardly on what the weights say, so a checkpoint can be made up in seconds
(random_weights.py says how the values are drawn). What such a model generates is noise.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phase0_prototype.config import ARCHITECTURES, Architecture, ModelConfig, parse_config
from phase0_prototype.errors import UserError
from phase0_prototype.hub import SHIPPED
from phase0_prototype.random_weights import STORED_AS, write_safetensors
from phase0_prototype.safetensors_files import INDEX, SINGLE
from phase0_prototype.shapes import SHAPES

__all__ = ["SHAPES", "checkpoint_bytes", "tensor_shapes", "write_checkpoint"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PARTIAL = ".partial"
_BAR_FROM = 100_000_000  # bytes; less is written before a bar could be read


def write_checkpoint(
    shape: str | Mapping[str, Any],
    out: Path,
    *,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
    tensors: Callable[[Any], Mapping[str, tuple[int, ...]]] | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 2 << 30,
    tokenizer: Path | None = None,
    force: bool = False,
) -> Path:
    """Write config.json, generation_config.json, safetensors with their index, and a tokenizer to `out`; returns it.

    `shape` is a name of SHAPES or the content of a config.json; `dtype` one of bfloat16, float16, float32. The same
    shape, seed and dtype give the same tensors, whatever `shard_bytes`. `tokenizer` is a directory; without it the
    tokenizer of the shipped model is copied where its ids fit the vocabulary. `force` replaces the checkpoint files in
    a directory that is not empty, once the new ones are complete. On failure or Ctrl-C nothing half-written stays.
    A later phase passes the `architectures` that it knows and, as `tensors`, what they have instead of `tensor_shapes`.

    Raises UserError: unknown shape or dtype, directory not empty, disk too small, tokenizer too large for the shape.
    """
    raw = _raw_config(shape)
    config = parse_config(raw, source=shape if isinstance(shape, str) else "shape", architectures=architectures)
    if dtype not in STORED_AS:
        raise UserError(f"dtype {dtype!r} is unknown: use {', '.join(STORED_AS)}")
    if seed < 0 or shard_bytes <= 0:
        raise UserError(f"seed is {seed} and shard_bytes {shard_bytes}: expected seed >= 0 and shard_bytes > 0")
    if out.exists() and not (out.is_dir() and (force or not _entries(out))):
        raise UserError(f"{out} exists and is not an empty directory: choose another, or replace it with --force")
    source = _tokenizer_source(tokenizer, config.vocab_size)
    shapes = (tensors or tensor_shapes)(config)
    total = sum(math.prod(s) for s in shapes.values()) * STORED_AS[dtype][1]
    _check_disk(out, total)
    try:
        with _complete_or_gone(out) as partial:
            with _bar(out, total) as advance:
                norm = 0.0 if config.offset_norms else 1.0
                _write_shards(partial, shapes, seed, dtype, norm, shard_bytes, advance)
            _write_json(partial / "config.json", {**raw, "torch_dtype": dtype})
            ids: dict[str, Any] = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if key in raw}
            _write_json(partial / "generation_config.json", ids)
            for name in TOKENIZER_FILES:
                if source is not None and (source / name).is_file():
                    shutil.copyfile(source / name, partial / name)
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror}") from None
    return out


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model in Hugging Face's names, in the order of the forward pass. Linears are [out, in]."""
    hidden, ff, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    linears = {
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.o_bias),
        "mlp.gate_proj": (ff, hidden, config.mlp_bias),
        "mlp.up_proj": (ff, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, ff, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, (n_out, n_in, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (n_out,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.output_norms:
            shapes[prefix + "pre_feedforward_layernorm.weight"] = (hidden,)
            shapes[prefix + "post_feedforward_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def checkpoint_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all tensors of the model in `dtype`."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values()) * STORED_AS[dtype][1]


def _write_shards(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    dtype: str,
    norm: float,
    shard_bytes: int,
    advance: Callable[[int], None],
) -> None:
    """Fill shards in the order of `shapes`. A single file gets no index, as in what transformers writes."""
    nbytes = {name: math.prod(shape) * STORED_AS[dtype][1] for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(nbytes[other] for other in shards[-1]) + nbytes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        wanted = {name: shapes[name] for name in names}
        write_safetensors(directory / file, wanted, seed=seed, dtype=dtype, norm=norm, advance=advance)
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map})


def _raw_config(shape: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(shape, str):
        return {key: value for key, value in shape.items() if key != "dtype"}  # `torch_dtype` will say it
    if shape not in SHAPES:
        raise UserError(f"shape {shape!r} is unknown: use {', '.join(SHAPES)}")
    return SHAPES[shape]


def _tokenizer_source(tokenizer: Path | None, vocab_size: int) -> Path | None:
    """The directory to copy a tokenizer from, or None. Raises UserError when one was asked for that cannot serve."""
    source = SHIPPED["titan-tiny"] if tokenizer is None else tokenizer
    file = source / "tokenizer.json"
    if not file.is_file():
        if tokenizer is None:
            return None
        raise UserError(f"{tokenizer} has no tokenizer.json: give the directory of a tokenizer")
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    largest = max(*vocabulary.values(), *(token["id"] for token in content.get("added_tokens", [])), 0)
    if largest < vocab_size:
        return source
    if tokenizer is None:
        return None
    raise UserError(f"{file} has ids up to {largest}, the shape has vocab_size {vocab_size}: use a smaller tokenizer")


def _check_disk(out: Path, total: int) -> None:
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if total + (64 << 20) > free:  # 64 MB for the small files and for others
        raise UserError(
            f"the checkpoint needs {total / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB free: choose another "
            "disk, a smaller shape or dtype"
        )


def _entries(directory: Path) -> list[Path]:
    """What is in a directory, without what a killed run may have left."""
    return [path for path in directory.iterdir() if path.name != _PARTIAL]


@contextmanager
def _complete_or_gone(out: Path) -> Iterator[Path]:
    """A directory to write into. Its files replace the old checkpoint in `out` at the end, or vanish on failure."""
    partial = out / _PARTIAL
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for pattern in ("*.safetensors", INDEX, "config.json", "generation_config.json", *TOKENIZER_FILES):
            for old in out.glob(pattern):
                old.unlink()
        for file in partial.iterdir():
            file.rename(out / file.name)
        partial.rmdir()
    except BaseException:
        shutil.rmtree(out if created else partial, ignore_errors=True)
        raise


@contextmanager
def _bar(out: Path, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal and the work takes a while."""
    if total < _BAR_FROM or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"writing {out}", total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
