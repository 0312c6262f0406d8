"""Log-probabilities of tokens: of the one that was chosen, its rank, and the k most likely ones.

Only the wanted cells are normalised: a logit minus the row's log-sum-exp is its log-probability, so nothing of the size
of the logits is written. Equal logits are ordered by token id, which makes the k best and the ranks the same on every
device, for every k and in every batch. (bfloat16 models have many equal logits.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOW32 = 2**32 - 1


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of N tokens, each under its own row of logits.

    Attributes:
        token_ids: [N] int64, the tokens.
        logprobs: [N] float32, theirs.
        ranks: [N] int64, 1 for the most likely token of the row.
        top_ids: [N, k] int64, the most likely tokens, best first.
        top_logprobs: [N, k] float32, theirs.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def logprobs_of(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """Log-probabilities under softmax(logits).

    Args:
        logits: [N, V] float32: of generated tokens, or of a prompt's positions 0..N-1.
        token_ids: [N] int64: the generated tokens, or the prompt's tokens 1..N.
        k: how many of the most likely tokens; -1 for all, more than V is V.
    """
    vocab_size = logits.shape[1]
    k = vocab_size if k < 0 else min(k, vocab_size)
    total = logits.logsumexp(-1, keepdim=True)  # [N, 1]
    order = _order(logits)
    own = order.gather(1, token_ids[:, None])  # [N, 1]
    best = order.topk(k, dim=-1).values  # [N, k]
    top_ids = _LOW32 - (best & _LOW32)
    return TokenLogprobs(
        token_ids=token_ids,
        logprobs=(logits.gather(1, token_ids[:, None]) - total)[:, 0],
        ranks=1 + (order > own).sum(-1),
        top_ids=top_ids,
        top_logprobs=logits.gather(1, top_ids) - total,
    )


def _order(logits: Tensor) -> Tensor:
    """Integers [N, V] int64 in the order of (logit, -token id), no two equal in a row.

    The bits of a positive float32 read as an integer are in its order; those of a negative one in the opposite order,
    until all but the sign are flipped. They take the high half, the token id counted down the low half.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << 32
    return high | (_LOW32 - torch.arange(logits.shape[1], device=logits.device))
