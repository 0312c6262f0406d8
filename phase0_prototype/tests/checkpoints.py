"""Tiny random checkpoints, written by `transformers`: one for each way in which the architectures differ.

`transformers` is the oracle of these tests and of nothing else: it makes the files and says what the right answer is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 320
CONTEXT = 192
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,  # nothing ends a sequence early, and transformers bans no token
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("Llama", {}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-one-layer": ("Llama", {"num_hidden_layers": 1}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-in-layer-1": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {"sliding_window": 10}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "head_dim": 16}),
}
TEXT = ["def add(a, b):\n    return a + b\n\n\nclass Stack:\n", "Grüße, 東京 🙂 and the cat"] * 2


@dataclass(frozen=True)
class Checkpoint:
    """A directory that the engine loads, and the same model in `transformers`."""

    path: Path
    oracle: Any

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """What `generate` of transformers continues the prompt with."""
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        out = self.oracle.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens)
        return list(out[0, len(prompt) :].tolist())

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[T, V] float32: one forward pass over all tokens, without a cache."""
        out = self.oracle(torch.tensor([list(tokens)]), use_cache=False).logits
        assert isinstance(out, torch.Tensor)
        return out[0]

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """[T, V] float32."""
        return self.logits(tokens).log_softmax(-1)


def write(variant: str, path: Path) -> Checkpoint:
    """The checkpoint of a variant."""
    family, changes = VARIANTS[variant]
    return save(family, {**SIZES, **changes}, path, seed=sum(map(ord, variant)))


def save(family: str, sizes: Mapping[str, Any], path: Path, seed: int, attention: str | None = None) -> Checkpoint:
    """A checkpoint of random weights, with a tokenizer. Biases and norms are random too: zeros and ones hide errors.

    `family` is as in LlamaConfig, `sizes` are its arguments, `attention` is an implementation of transformers.
    """
    config = getattr(transformers, f"{family}Config")(**sizes)
    if attention is not None:
        config._attn_implementation = attention
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = name.endswith("norm.weight")
            centre = weight if norm else 0  # a norm's starts where it changes nothing: at 1, or at 0 where it is 1 + it
            weight.copy_((0.2 if norm else 0.15) * torch.randn(weight.shape, generator=generator) + centre)
    model.save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    return Checkpoint(path, model)


def with_files(source: Path, path: Path, **contents: dict[str, Any] | None) -> Path:
    """The same weights with other JSON files: `config={"eos_token_id": 5}` sets that key, `tokenizer=None` drops it."""
    path.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.stem not in contents:
            (path / file.name).symlink_to(file)
    for stem, changes in contents.items():
        if changes is not None:
            old = json.loads((source / f"{stem}.json").read_text())
            (path / f"{stem}.json").write_text(json.dumps({**old, **changes}))
    return path


def tokenizer() -> Tokenizer:
    """Every byte is a token (so any ids have a text), a few words are, and id 0 is special."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids, the same for the same length and seed."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return list(torch.randint(VOCAB, (length,), generator=generator).tolist())
