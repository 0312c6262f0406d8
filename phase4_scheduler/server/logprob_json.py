"""Log-probabilities in the three shapes that clients know: completions, chat, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phase0_prototype.outputs import Logprob, PositionLogprobs

_LOWEST = -9999.0  # JSON has no -inf; vLLM writes this number too


def completion_logprobs(
    positions: Sequence[tuple[int, PositionLogprobs | None]], offset: int, text_of: Any
) -> tuple[dict[str, Any], int]:
    """The `logprobs` of a completion's choice, and the offset after it.

    Args:
        positions: (token id, candidates) of each; no candidates for the first token of a prompt.
        offset: characters before the first.
        text_of: the text of a token id on its own.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, candidates in positions:
        text = text_of(token_id) if candidates is None else candidates[token_id].decoded_token or ""
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if candidates is None else _finite(candidates[token_id].logprob))
        tops.append(None if candidates is None else _by_text(candidates))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset


def chat_logprobs(token_ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int) -> dict[str, Any]:
    """The `logprobs` of a chat's choice: for each token itself and the `top` most likely, best first."""
    content = []
    for token_id, candidates in zip(token_ids, positions, strict=True):
        best = sorted((c for c in candidates.values() if c.rank and c.rank <= top), key=lambda c: c.rank or 0)
        content.append({**_entry(candidates[token_id]), "top_logprobs": [_entry(c) for c in best]})
    return {"content": content, "refusal": None}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's: by token id; null for the first token, which nothing predicts."""
    return [
        None
        if candidates is None
        else {
            str(i): {"logprob": _finite(c.logprob), "rank": c.rank, "decoded_token": c.decoded_token}
            for i, c in candidates.items()
        }
        for candidates in positions
    ]


def _entry(candidate: Logprob) -> dict[str, Any]:
    text = candidate.decoded_token or ""
    # The text of a token that is part of a character says nothing about its bytes.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _finite(candidate.logprob), "bytes": known}


def _by_text(candidates: PositionLogprobs) -> dict[str, float]:
    """Tokens may share a text (parts of characters): the most likely one counts."""
    found: dict[str, float] = {}
    for candidate in candidates.values():
        text = candidate.decoded_token or ""
        found[text] = max(found.get(text, _LOWEST), _finite(candidate.logprob))
    return found


def _finite(value: float) -> float:
    return max(value, _LOWEST)
