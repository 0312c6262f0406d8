"""From what a step chose to what the client is told of it: plain numbers, cut into messages of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from phase0_prototype.request import Request
from phase4_scheduler.core.wire import Delta, Ranked

if TYPE_CHECKING:
    from phase0_prototype.logprobs import TokenLogprobs

ALL = -1  # in `Delta.index`: every sequence of the prompt
_VALUES_AT_ONCE = 500_000  # log-probabilities in a message at most, about 7 MB: "all of them" for a long prompt is GB


def prompt_id(request: Request) -> str:
    """The id under which the client knows the prompt of this sequence."""
    return request.group or request.request_id


def ranked(logprobs: TokenLogprobs, row: int, k: int) -> Ranked:
    """One row of a step's log-probabilities as numbers; k = -1: all that there are."""
    k = logprobs.top_ids.shape[1] if k < 0 else k
    return Ranked(
        int(logprobs.token_ids[row]),
        float(logprobs.logprobs[row]),
        int(logprobs.ranks[row]),
        logprobs.top_ids[row, :k].tolist(),
        logprobs.top_logprobs[row, :k].tolist(),
    )


def of_prompt(request: Request, start: int, logprobs: TokenLogprobs) -> Iterator[Delta]:
    """What a chunk of a prompt was predicted with, from its token `start` on: one delta for so many values."""
    k = request.params.prompt_logprobs or 0
    count = len(logprobs.token_ids)
    rows = max(1, _VALUES_AT_ONCE // max(1, logprobs.top_ids.shape[1] if k < 0 else k))
    for first in range(0, count, rows):
        values = [ranked(logprobs, row, k) for row in range(first, min(first + rows, count))]
        yield Delta(prompt_id(request), request.index, [], prompt_logprobs=(start + first, values))


def parcels(deltas: list[Delta]) -> Iterator[list[Delta]]:
    """The same deltas in order, in parts that hold no more than a message may."""
    part: list[Delta] = []
    weight = 0
    for delta in deltas:
        size = _values(delta)
        if part and weight + size > _VALUES_AT_ONCE:
            yield part
            part, weight = [], 0
        part.append(delta)
        weight += size
    yield part


def _values(delta: Delta) -> int:
    if delta.logprobs is None and delta.prompt_logprobs is None:
        return 0
    rows = (delta.logprobs or []) + (delta.prompt_logprobs[1] if delta.prompt_logprobs else [])
    return sum(len(row.top_ids) for row in rows)
