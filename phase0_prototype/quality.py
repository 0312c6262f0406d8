"""How well a model predicts text that it never saw: nats per token and bits per byte, through the public API.

The held-out text is a snapshot of the 5 % of the standard library that `corpus.is_held_out` keeps away from training
(models/held_out.jsonl.gz). It is shipped, so that a figure means the same on every machine and Python version.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phase0_prototype.corpus import Document
from phase0_prototype.llm import LLM
from phase0_prototype.sampling_params import SamplingParams

HELD_OUT = Path(__file__).parent / "models" / "held_out.jsonl.gz"


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of a text under a model.

    Attributes:
        nats_per_token: mean negative log-probability of a token.
        bits_per_byte: the same for a byte of UTF-8, comparable between tokenizers.
        tokens: predicted tokens.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of nats per token."""
        return math.exp(self.nats_per_token)


def read_held_out(file: Path = HELD_OUT) -> list[Document]:
    """The shipped held-out documents, in order of path."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def write_held_out(documents: Iterable[Document], file: Path = HELD_OUT) -> None:
    """Write documents so that equal contents give equal bytes."""
    text = "".join(json.dumps({"path": d.path, "text": d.text}) + "\n" for d in documents)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def held_out_loss(
    llm: LLM, documents: Sequence[Document], *, max_tokens: int | None = None, progress: bool = False
) -> Loss:
    """Loss over windows of the model's whole context, cut from each document on its own, no token counted twice.

    Args:
        llm: with a tokenizer.
        documents: texts; each begins with the end-of-text token, as in training.
        max_tokens: stop after this many tokens.
        progress: show a bar.
    """
    tokenizer, window = llm.engine.tokenizer, llm.engine.max_model_len - 1
    assert tokenizer is not None
    start = llm.engine.config.bos_token_id or 0
    windows: list[list[int]] = []
    nbytes = 0
    for document in documents:
        ids = [start, *tokenizer.encode(document.text)]
        pieces = [ids[i : i + window] for i in range(0, len(ids) - 1, window - 1)]
        windows += [p for p in pieces if len(p) > 1]
        nbytes += len(document.text.encode())
        if max_tokens is not None and sum(map(len, windows)) >= max_tokens:
            break
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for output in llm.generate(windows, params, progress=progress):
        assert output.prompt_logprobs is not None
        for token, candidates in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if candidates is not None:
                total -= candidates[token].logprob
                count += 1
    return Loss(total / count, total / math.log(2) / nbytes, count)
