"""Random checkpoints: published sizes, loadable by transformers, reproducible, and never left half-written."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from phase0_prototype import checkpoint, checkpoint_commands
from phase0_prototype.checkpoint import SHAPES, checkpoint_bytes, tensor_shapes, write_checkpoint
from phase0_prototype.config import load_config, parse_config
from phase0_prototype.errors import UserError

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY}
ARCHITECTURES = {
    "llama": LLAMA,
    "llama tied with biases": {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **TINY, "sliding_window": 8},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **TINY, "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **TINY, "head_dim": 32},
}
# As the model cards and the files on the hub give them. Tied weights count once.
PUBLISHED_PARAMETERS = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama3.2-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def digest(directory: Path) -> dict[str, str]:
    """Hash of every tensor's bytes."""
    tensors = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    return {name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def contents(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shapes = tensor_shapes(parse_config(SHAPES[name]))
    assert sum(math.prod(shape) for shape in shapes.values()) == PUBLISHED_PARAMETERS[name]
    assert checkpoint_bytes(parse_config(SHAPES[name]), "bfloat16") == 2 * PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_loads_it_with_no_key_missing_or_left_over(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_checkpoint(ARCHITECTURES[name], tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    logits = model(torch.arange(32)[None]).logits.float()
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 10
    assert load_config(tmp_path).dtype == "bfloat16"


def test_files_are_what_the_index_says_and_shards_keep_to_their_size(tmp_path: Path) -> None:
    write_checkpoint(LLAMA, tmp_path, shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert file.stat().st_size < 70_000 or len(names) == 1
            found |= dict.fromkeys(names, file.name)
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == checkpoint_bytes(load_config(tmp_path), "bfloat16")


def test_values_are_normal_with_std_0_02_and_norms_are_one(tmp_path: Path) -> None:
    big = {**LLAMA, "hidden_size": 512, "vocab_size": 4000, "attention_bias": True}
    tensors = load_file(write_checkpoint(big, tmp_path, dtype="float32") / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].flatten()  # 2 M values: more than are drawn at a time
    sigmas = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    expected = torch.special.ndtr(sigmas)
    measured = (embedding[:, None] < sigmas * 0.02).float().mean(0)
    torch.testing.assert_close(measured, expected, rtol=0, atol=2e-3)
    assert abs(embedding.mean()) < 1e-4
    other = tensors["lm_head.weight"].flatten()
    correlation = torch.corrcoef(torch.stack([embedding, other, embedding.roll(1), embedding.roll(512)]))
    assert (correlation - torch.eye(4)).abs().max() < 5e-3  # tensors and neighbours are independent
    assert tensors["model.layers.0.self_attn.q_proj.bias"].std() > 0.015
    assert all((t == 1).all() for name, t in tensors.items() if name.endswith("norm.weight"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_are_the_float32_values_rounded(dtype: str, tmp_path: Path) -> None:
    exact = load_file(write_checkpoint(LLAMA, tmp_path / "f32", dtype="float32") / "model.safetensors")
    short = load_file(write_checkpoint(LLAMA, tmp_path / "short", dtype=dtype) / "model.safetensors")
    for name, tensor in exact.items():
        assert torch.equal(tensor.to(getattr(torch, dtype)), short[name])


def test_a_seed_decides_the_tensors_and_the_shards_do_not(tmp_path: Path) -> None:
    first = digest(write_checkpoint(LLAMA, tmp_path / "a", seed=3))
    assert digest(write_checkpoint(LLAMA, tmp_path / "b", seed=3, shard_bytes=50_000)) == first
    other = digest(write_checkpoint(LLAMA, tmp_path / "c", seed=4))
    assert {name for name in first if first[name] == other[name]} == {n for n in first if n.endswith("norm.weight")}
    assert len(set(first.values())) == len(first) - 4  # of 5 norms, all the same; no other two tensors are


# The directory


def test_directory_in_use_is_left_alone_without_force(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        write_checkpoint(LLAMA, tmp_path)
    assert contents(tmp_path) == {"notes.txt"}


def test_force_replaces_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_checkpoint(LLAMA, tmp_path, force=True)
    write_checkpoint(LLAMA, tmp_path, force=True, shard_bytes=200_000)
    names = contents(tmp_path)
    assert "notes.txt" in names
    assert "model.safetensors" not in names, "a stale single file would be read instead of the shards"
    write_checkpoint(LLAMA, tmp_path, force=True)
    assert "model.safetensors.index.json" not in contents(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_or_failed_write_leaves_no_trace(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    old = digest(write_checkpoint(LLAMA, tmp_path / "old"))
    monkeypatch.setattr(checkpoint, "_write_json", fail)  # called when the weights are written already
    for out in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises((KeyboardInterrupt, UserError)):
            write_checkpoint(LLAMA, out, seed=1, force=True)
    assert not (tmp_path / "new").exists()
    assert digest(tmp_path / "old") == old
    assert ".partial" not in contents(tmp_path / "old")


def test_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**9))
    with pytest.raises(UserError, match=r"needs 141\.1 GB, .* has 1\.0 GB free"):
        write_checkpoint("llama3-70b", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# The tokenizer


def tokenizer(directory: Path, largest: int) -> Path:
    directory.mkdir()
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": largest, "content": "<end>"}]}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def test_tokenizer_is_copied_where_its_ids_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, large = tokenizer(tmp_path / "fits", 319), tokenizer(tmp_path / "large", 320)
    out = write_checkpoint(LLAMA, tmp_path / "a", tokenizer=fits)
    assert (out / "tokenizer.json").read_text() == (fits / "tokenizer.json").read_text()
    with pytest.raises(UserError, match=r"ids up to 320.*vocab_size 320"):
        write_checkpoint(LLAMA, tmp_path / "b", tokenizer=large)
    monkeypatch.setattr(checkpoint, "SHIPPED", {"titan-tiny": large})
    assert "tokenizer.json" not in contents(write_checkpoint(LLAMA, tmp_path / "c"))
    monkeypatch.setattr(checkpoint, "SHIPPED", {"titan-tiny": fits})
    assert "tokenizer.json" in contents(write_checkpoint(LLAMA, tmp_path / "d"))


# Mistakes and the command


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"shape": "llama9"}, "tinyllama-1.1b"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"seed": -1}, "seed"),
        ({"shape": {**LLAMA, "num_hidden_layers": 0}}, "num_hidden_layers"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word) as caught:
        write_checkpoint(**{"shape": LLAMA, "out": tmp_path / "new", **arguments})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_command_lists_shapes_writes_and_complains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHAPES", {"tiny": LLAMA})
    app = typer.Typer()
    app.command("other")(lambda: None)  # with one command only, typer would swallow its name
    checkpoint_commands.register(app)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["checkpoint", *arguments])

    assert "tiny" in run("--list").stdout
    assert run("tiny", "--out", str(tmp_path / "new"), "--seed", "5", "--dtype", "float16").exit_code == 0
    assert digest(tmp_path / "new") == digest(write_checkpoint(LLAMA, tmp_path / "same", seed=5, dtype="float16"))
    again = run("tiny", "--out", str(tmp_path / "new")).exception
    assert getattr(again, "is_user_error", False)
    assert run("tiny", "--out", str(tmp_path / "new"), "--force").exit_code == 0
    assert isinstance(run("tiny").exception, UserError)
