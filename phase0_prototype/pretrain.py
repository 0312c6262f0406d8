"""Train the model that the project ships: `python -m phase0_prototype.pretrain --out DIR`.

Everything needed is on the machine: the text is Python's standard library (corpus.py), the architecture a small Llama.
Hidden matrices are trained with Muon, the rest with AdamW, on a trapezoid schedule: warm-up, constant, linear decay.
A constant middle makes the run *resumable with another budget*: stop it whenever, start it again with the same `--out`
and a smaller or larger `--tokens`, and only the decay moves. The decay runs on 1,024-token windows, the rest on 256.

The forward under training is `transformers`' Llama: an engine that later agrees with it token for token was not
trained to agree with itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from phase0_prototype import corpus

REPORT_STEPS = 20
HELD_OUT_STEPS = 200
SAVE_SECONDS = 180
VOCAB_SIZE = 4096
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run. Learning rates are peaks; Muon's is matched to AdamW's update size."""

    tokens: int = 20_000_000
    tokens_per_step: int = 4096
    seq_len: int = 256
    decay_seq_len: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200
    decay_fraction: float = 0.25
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps in the whole run."""
        return self.tokens // self.tokens_per_step

    def in_decay(self, step: int) -> bool:
        """Whether this step belongs to the linear decay at the end of the run."""
        return step >= round(self.steps * (1 - self.decay_fraction))

    def rate(self, step: int) -> float:
        """Multiplier of the peak learning rate at this step, in 0..1."""
        left = (self.steps - step) / max(1, round(self.steps * self.decay_fraction))
        return min(1.0, (step + 1) / self.warmup_steps, max(left, 0.0))


class Windows:
    """Windows of the corpus in random order, a function of (seed, position in the run): a resumed run sees the same.

    Each epoch joins the files in a new order, cuts the stream into windows and shuffles those, so that the rows of a
    batch come from all over the library.
    (Neighbouring windows are one file: with those in a batch, the loss soon stops.)
    """

    def __init__(self, encoded: list[npt.NDArray[np.uint16]], seed: int) -> None:
        self.encoded, self.seed = encoded, seed
        self.total = sum(map(len, encoded))
        self._epoch: tuple[int, int] | None = None
        self._windows = np.empty((0, 0), np.uint16)

    def batch(self, first_token: int, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets, both [rows, seq_len] int64, from the tokens after `first_token` of the run."""
        first = first_token // seq_len
        out = np.stack([self._window(first + r, seq_len) for r in range(rows)])
        ids = torch.from_numpy(out.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    def _window(self, number: int, seq_len: int) -> npt.NDArray[np.uint16]:
        per_epoch = (self.total - 1) // seq_len
        epoch, index = divmod(number, per_epoch)
        if (epoch, seq_len) != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            stream = np.concatenate([self.encoded[i] for i in rng.permutation(len(self.encoded))])
            starts = rng.permutation(per_epoch) * seq_len
            self._windows = np.stack([stream[s : s + seq_len + 1] for s in starts])
            self._epoch = (epoch, seq_len)
        return self._windows[index]


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings (tied to the head) and norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(
        hidden, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [{"params": embeddings, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    return [muon, adamw]


def loss_function(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats; ids and targets [B, S]."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(
    loss: Callable[[Any, Tensor, Tensor], Tensor],
    model: LlamaForCausalLM,
    stream: npt.NDArray[np.uint16],
    rows: int,
    seq: int,
) -> float:
    """Mean nats/token over the first windows of the held-out stream (a progress figure; the card's is exact)."""
    windows = min(64, (len(stream) - 1) // seq) // rows * rows
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, windows, rows):
        block = np.stack([stream[i * seq : i * seq + seq + 1] for i in range(start, start + rows)]).astype(np.int64)
        ids = torch.from_numpy(block).to(device)
        total += loss(model, ids[:, :-1], ids[:, 1:]).item()
    return total / (windows // rows)


@dataclass
class Progress:
    """What a run resumes from, beside the weights: steps taken and tokens seen."""

    step: int = 0
    seen: int = 0


def load_tokenizer(file: Path, documents: list[corpus.Document]) -> Tokenizer:
    """The run's tokenizer; trained on the documents and saved when the file is not there yet."""
    if not file.exists():
        corpus.train_tokenizer((d.text for d in documents), VOCAB_SIZE).save(str(file))
    return Tokenizer.from_file(str(file))


def save_state(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Write everything that a run resumes from, replacing the file at once."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **asdict(progress)}
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def load_state(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], device: str) -> Progress:
    """Restore a run; a new `Progress` when there is none."""
    if not file.exists():
        return Progress()
    state = torch.load(file, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    print(f"resumed at step {state['step']}, {state['seen'] / 1e6:.1f} M tokens")
    return Progress(state["step"], state["seen"])


def update(value: Tensor, model: nn.Module, optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One optimiser step on the loss `value` at this learning rate, with gradients clipped to norm 1."""
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train(out: Path, recipe: Recipe, *, device: str, compile_model: bool, minutes: float) -> None:
    """Train until the recipe's tokens are used or `minutes` have passed, saving a resumable state every few minutes."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    documents = list(corpus.documents(held_out=False))
    tokenizer = load_tokenizer(out / "tokenizer.json", documents)
    windows = Windows(corpus.encode_documents(tokenizer, documents), recipe.seed)
    held_out = np.concatenate(corpus.encode_documents(tokenizer, list(corpus.documents(held_out=True))))
    config = LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0, pad_token_id=1, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(device)
    optimizers = make_optimizers(model, recipe)
    progress = load_state(out / "state.pt", model, optimizers, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {windows.total / 1e6:.2f} M training tokens")
    loss = torch.compile(loss_function, dynamic=False) if compile_model else loss_function

    began = saved_at = reported_at = time.perf_counter()
    reported = progress.seen
    while progress.step < recipe.steps and time.perf_counter() - began < minutes * 60:
        seq = recipe.decay_seq_len if recipe.in_decay(progress.step) else recipe.seq_len
        rows = recipe.tokens_per_step // seq
        ids, targets = (t.to(device) for t in windows.batch(progress.seen, rows, seq))
        value = loss(model, ids, targets)
        update(value, model, optimizers, recipe.learning_rate * recipe.rate(progress.step))
        progress.step, progress.seen = progress.step + 1, progress.seen + rows * seq
        now = time.perf_counter()
        if progress.step % REPORT_STEPS == 0:
            if math.isnan(value.item()):
                raise FloatingPointError(f"the loss is NaN: lower --learning-rate ({recipe.learning_rate})")
            speed = (progress.seen - reported) / (now - reported_at)
            line = {"step": progress.step, "tokens": progress.seen, "loss": round(value.item(), 4)}
            if progress.step % HELD_OUT_STEPS == 0 or progress.step == recipe.steps:
                line["held_out"] = round(held_out_loss(loss, model, held_out, rows, seq), 4)
            left = (recipe.tokens - progress.seen) / speed / 60
            print(f"{json.dumps(line)} {speed:,.0f} tokens/s, {left:.0f} min left", flush=True)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            reported_at, reported = time.perf_counter(), progress.seen
        if now - saved_at > SAVE_SECONDS:
            save_state(out / "state.pt", model, optimizers, progress)
            saved_at = time.perf_counter()
    save_state(out / "state.pt", model, optimizers, progress)


def main() -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/titan-tiny"))
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    recipe = Recipe(tokens=args.tokens, learning_rate=args.learning_rate)
    train(args.out, recipe, device=args.device, compile_model=args.compile, minutes=args.minutes)


if __name__ == "__main__":
    main()
