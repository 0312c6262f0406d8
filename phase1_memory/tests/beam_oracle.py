"""What `transformers` finds with beam search: the oracle of the search's logic and of the engine that runs it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers

from phase1_memory.beam_search import BeamSearchParams


def tiny_llama(seed: int, vocab_size: int = 96, ends: Iterable[int] = (), eagerness: float = 3.0) -> Any:
    """A random Llama of 2 layers in float32. `ends` become its eos token ids, `eagerness` times as loud as others.

    A token whose row of the last layer is long is often the likeliest and as often the least likely one: sequences end
    early, late and not at all.
    """
    ends = sorted(ends)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ends or None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[ends] *= eagerness
    return model


def end_tokens(model: Any, params: BeamSearchParams) -> tuple[int, ...]:
    """All tokens that end a sequence: the model's own and those that were asked for."""
    eos = model.generation_config.eos_token_id
    own = [] if eos is None or params.ignore_eos else [eos] if isinstance(eos, int) else eos
    return tuple(sorted({*own, *params.stop_token_ids}))


@torch.no_grad()
def hf_beams(model: Any, prompt_ids: Sequence[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    """Generated tokens and score of each sequence that `generate` returns, best first.

    The end token is kept, padding is cut off. A vocabulary smaller than `beam_width` is refused: there `transformers`
    fills up with sequences that score -1e9.
    """
    ends = end_tokens(model, params)
    if model.config.vocab_size < params.beam_width * max(2, 1 + len(ends)):
        raise ValueError(f"beam_width={params.beam_width} is too wide for {model.config.vocab_size} tokens")
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        num_beams=params.beam_width,
        num_return_sequences=params.n or params.beam_width,
        early_stopping=params.early_stopping,
        length_penalty=float(params.length_penalty),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = [_cut(row, ends) for row in found.sequences[:, len(prompt_ids) :].tolist()]
    if params.beam_width > 1:
        return list(zip(sequences, found.sequences_scores.tolist(), strict=True))
    # greedy decoding has logits and no scores: the one that beam search would give is computed here
    rows = torch.cat(found.scores).log_softmax(-1)[: len(sequences[0])]
    total = math.fsum(rows[range(len(rows)), sequences[0]].tolist())
    return [(sequences[0], total / len(rows) ** params.length_penalty)]


def _cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
