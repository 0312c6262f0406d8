"""From logits to tokens: bans, penalties, temperature, filters, then the most likely token or a random one.

    logits ─▶ log-probabilities (of the model's own logits)
       └────▶ ban ends before min_tokens ▶ penalties ▶ ÷ temperature ▶ min_p ▶ top_k ▶ top_p ▶ + Gumbel noise ▶ argmax

The order is vLLM's (`vllm/v1/sample/sampler.py`). Each row is decided by its own request alone: the noise is a function
of the request's seed and the token's index (rng.py), and a stage leaves rows that did not ask for it as they were, bit
for bit. Equal logits are kept or cut together, so no result depends on how a device sorts.

B rows, S of them drawn at random (the others greedy), V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phase0_prototype import rng
from phase0_prototype.logprobs import TokenLogprobs, logprobs_of
from phase0_prototype.sampling_rows import Drawn, SamplingRows
from phase0_prototype.step import NO_TOKEN, insist


@dataclass(frozen=True)
class Sampled:
    """The tokens of a step, still on the device.

    Attributes:
        token_ids: [B] int64; -1 in a row from which none could be chosen.
        logprobs: for every row with the largest k that a row asked for; None when no row asked.
        request_ids: the request of each row.
    """

    token_ids: Tensor
    logprobs: TokenLogprobs | None
    request_ids: tuple[str, ...]

    def tolist(self) -> list[int]:
        """Fetch the tokens: the one wait for the device. Raises `SamplingError` that names the first bad row."""
        tokens: list[int] = self.token_ids.tolist()
        insist(tokens, self.request_ids)
        return tokens


@torch.inference_mode()
def sample(logits: Tensor, rows: SamplingRows) -> Sampled:
    """Choose one token for each row.

    Args:
        logits: [B, V] float32, not changed.
        rows: what each row asks for.
    """
    if rows.plain:
        return Sampled(_best(logits), None, rows.request_ids)
    logits = logits.float()
    scores = adjusted_logits(logits, rows)
    if rows.drawn is not None:
        _add_noise(scores, rows.drawn)
    token_ids = _best(scores)
    logprobs = None
    if rows.logprobs is not None:
        logprobs = logprobs_of(logits, token_ids.clamp(min=0), rows.logprobs)
    return Sampled(token_ids, logprobs, rows.request_ids)


@torch.inference_mode()
def adjusted_logits(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The logits [B, V] float32 whose softmax each row is drawn from, -inf where a token is out of the question.

    Greedy rows have bans and penalties only. Verifying drafts (phase 7) compares distributions and starts here.
    """
    if not rows.adjusts:
        return logits.float()
    scores = logits.to(torch.float32, copy=True)
    if rows.banned is not None:
        scores[rows.banned.rows, rows.banned.token_ids] = -math.inf
    if rows.repeated is not None:
        cells = rows.repeated
        old = scores[cells.rows, cells.token_ids]
        scores[cells.rows, cells.token_ids] = torch.where(old < 0, old * cells.amounts, old / cells.amounts)
    if rows.counted is not None:
        cells = rows.counted
        scores[cells.rows, cells.token_ids] -= cells.amounts
    if rows.drawn is not None:
        if rows.drawn.rows is None:
            return _shape(scores, rows.drawn)
        scores[rows.drawn.rows] = _shape(scores[rows.drawn.rows], rows.drawn)
    return scores


def _shape(scores: Tensor, drawn: Drawn) -> Tensor:
    """Temperature and filters, in place. scores [S, V]."""
    scores /= drawn.temperature[:, None]
    if drawn.any_min_p:
        # p < min_p * p_max, in logarithms; log(0) = -inf filters nothing
        _cut(scores, scores.amax(-1) + drawn.min_p.log())
    if drawn.max_top_k:
        _cut(scores, _kth(scores.topk(min(drawn.max_top_k, scores.shape[1])).values, drawn.top_k))
    if drawn.any_top_p:
        probabilities = scores.softmax(-1)
        scores.masked_fill_(probabilities < _nucleus(probabilities, drawn.top_p)[:, None], -math.inf)
    return scores


def _cut(scores: Tensor, threshold: Tensor) -> None:
    """Rule out what is below its row's threshold [S], in place."""
    scores.masked_fill_(scores < threshold[:, None], -math.inf)


def _kth(ranked: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest of each row [S], or the last where there are not so many; -inf where top_k is 0 (off).

    ranked [S, R] descends.
    """
    last = (top_k.clamp(min=1, max=ranked.shape[1]) - 1)[:, None]
    return ranked.gather(1, last)[:, 0].masked_fill(top_k == 0, -math.inf)


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability in each row's nucleus [S]; 0 where top_p is 1.

    A token is in it while those before it, most likely first, hold less than top_p. Tokens under (1 - top_p) / V hold
    less than 1 - top_p together, so none of them is in it: as a rule a few hundred are left to be sorted.
    """
    vocab_size = probabilities.shape[1]
    filters = top_p < 1
    enough = vocab_size
    if probabilities.device.type == "cpu":  # elsewhere, counting would wait for the device
        floor = ((1 - top_p) * (0.5 / vocab_size)).masked_fill(~filters, math.inf)  # half of it: sums are rounded
        enough = max(1, int((probabilities >= floor[:, None]).sum(-1).max()))
    ranked = _largest(probabilities, enough)  # [S, enough]
    before = ranked.cumsum(-1) - ranked
    kept = (before < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    return ranked.gather(1, kept - 1)[:, 0] * filters


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, largest first."""
    if values.device.type == "cpu" and count > values.shape[1] // 8:  # NumPy sorts with vector instructions
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)[:, :count]
    return values.topk(count).values


def _add_noise(scores: Tensor, drawn: Drawn) -> None:
    """Make the argmax of the drawn rows a sample of their softmax, in place. scores [B, V]."""
    if scores.device.type == "cpu" and drawn.filters:
        part = scores if drawn.rows is None else scores[drawn.rows]  # [S, V]
        which, token_ids = (part != -math.inf).nonzero(as_tuple=True)  # [N] cells that the filters left
        if which.numel() * 4 < part.numel():
            noise = rng.gumbel(drawn.seeds[which], drawn.positions[which], token_ids[:, None])[:, 0]
            scores[which if drawn.rows is None else drawn.rows[which], token_ids] += noise
            return
    noise = rng.gumbel(drawn.seeds, drawn.positions, torch.arange(scores.shape[1], device=scores.device))  # [S, V]
    if drawn.rows is None:
        scores += noise
    else:
        scores.index_add_(0, drawn.rows, noise)


def _best(scores: Tensor) -> Tensor:
    """The first largest of each row [B] int64, or -1 where that is not a finite number. (NaN counts as the largest.)"""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        # NumPy's argmax uses vector instructions and no thread pool: 4 to 100 times as fast as torch's
        table = scores.numpy()
        best = table.argmax(-1)
        bad = ~np.isfinite(table[np.arange(len(best)), best])
        if bad.any():
            best[bad] = NO_TOKEN
        return torch.from_numpy(best)
    values, token_ids = scores.max(-1)
    return token_ids.masked_fill_(~values.isfinite(), NO_TOKEN)
