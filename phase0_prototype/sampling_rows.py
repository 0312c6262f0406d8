"""What the sampler needs to know about the rows of one step, gathered from their requests.

Built anew for each step. A batch in which every request is plain greedy, the usual case in tests and benchmarks, costs
one pass over the requests and no tensor; anything else is packed into a few tensors, so that a GPU gets few copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from phase0_prototype.sampling_params import SamplingParams


class Sampling(Protocol):
    """What is read of a sequence. `phase0_prototype.request.Request` is one; a draft's branch may be another."""

    @property
    def request_id(self) -> str:
        """Named in errors."""

    @property
    def params(self) -> SamplingParams:
        """What the user asked for."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """Read for the repetition penalty."""

    @property
    def output_token_ids(self) -> Sequence[int]:
        """Generated so far: its length is the index of the token to choose."""

    @property
    def seed(self) -> int:
        """Resolved: from `params.seed` or the engine's."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Banned before `params.min_tokens`."""


# Cells of one row: the row, the token ids, and one amount for all or one for each.
CellsOfRow = tuple[int, Sequence[int], float | Sequence[float]]


@dataclass(frozen=True)
class Cells:
    """Some cells of the logits [B, V], each with a number: the sparse form of a penalty."""

    rows: Tensor  # [C] int64
    token_ids: Tensor  # [C] int64
    amounts: Tensor  # [C] float32

    @staticmethod
    def build(parts: Sequence[CellsOfRow], vocab_size: int, device: torch.device) -> Cells | None:
        """Pack the cells that have a logit; None when there are none."""
        if not parts:
            return None
        rows = np.repeat([row for row, _, _ in parts], [len(ids) for _, ids, _ in parts])
        token_ids = np.concatenate([np.array(ids, dtype=np.int64) for _, ids, _ in parts])
        amounts = np.concatenate([np.resize(np.array(amount, np.float32), len(ids)) for _, ids, amount in parts])
        inside = token_ids < vocab_size
        where = torch.from_numpy(np.stack([rows, token_ids])[:, inside]).to(device)
        return Cells(where[0], where[1], torch.from_numpy(amounts[inside]).to(device))


@dataclass(frozen=True)
class Drawn:
    """The rows that are drawn at random, in the order of the batch. S of them.

    Attributes:
        rows: their indices in the batch; None when they are all of it.
        temperature, min_p, top_p: [S] float32; 0 and 1 mean off for the last two.
        seeds, positions, top_k: [S] int64; a top_k of 0 means off.
        max_top_k: the largest top_k; 0 when no row has one.
        any_min_p, any_top_p: whether a row has one.
    """

    rows: Tensor | None
    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    seeds: Tensor
    positions: Tensor
    top_k: Tensor
    max_top_k: int
    any_min_p: bool
    any_top_p: bool

    @property
    def filters(self) -> bool:
        """Whether a row rules out tokens, as a rule most of them."""
        return self.max_top_k > 0 or self.any_min_p or self.any_top_p

    @staticmethod
    def build(requests: Sequence[Sampling], device: torch.device, ahead: Sequence[int] = ()) -> Drawn | None:
        """Pack the requests with a temperature; None when there are none. `ahead` as for `SamplingRows.build`."""
        chosen = [row for row, request in enumerate(requests) if not request.params.greedy]
        if not chosen:
            return None
        params = [requests[row].params for row in chosen]
        top_k = [max(0, p.top_k) for p in params]
        seeds = [requests[row].seed for row in chosen]
        positions = [len(requests[row].output_token_ids) + (ahead[row] if ahead else 0) for row in chosen]
        integers = torch.tensor([chosen, seeds, positions, top_k], dtype=torch.int64).to(device)
        numbers = [[p.temperature for p in params], [p.min_p for p in params], [p.top_p for p in params]]
        temperature, min_p, top_p = torch.tensor(numbers, dtype=torch.float32).to(device)
        return Drawn(
            rows=None if len(chosen) == len(requests) else integers[0],
            temperature=temperature,
            min_p=min_p,
            top_p=top_p,
            seeds=integers[1],
            positions=integers[2],
            top_k=integers[3],
            max_top_k=max(top_k),
            any_min_p=any(p.min_p > 0 for p in params),
            any_top_p=any(p.top_p < 1 for p in params),
        )


@dataclass(frozen=True)
class SamplingRows:
    """How each row of the logits of a step is turned into a token.

    Attributes:
        request_ids: the request of each row, for errors.
        drawn: the rows with a temperature.
        banned: tokens that may not be chosen yet.
        repeated: tokens of prompt and output with their row's repetition penalty.
        counted: tokens of the output with what presence and frequency penalties subtract.
        logprobs: the most log-probabilities that a row wants; -1 is all, None is none.
    """

    request_ids: tuple[str, ...]
    drawn: Drawn | None = None
    banned: Cells | None = None
    repeated: Cells | None = None
    counted: Cells | None = None
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the largest logit of each row is all that is asked for."""
        return not self.adjusts and self.logprobs is None

    @property
    def adjusts(self) -> bool:
        """Whether any row's logits are changed before the choice."""
        return any(part is not None for part in (self.drawn, self.banned, self.repeated, self.counted))

    @staticmethod
    def build(
        requests: Sequence[Sampling],
        vocab_size: int,
        device: torch.device | str = "cpu",
        ahead: Sequence[int] = (),
    ) -> SamplingRows:
        """Gather the rows of a step.

        Args:
            requests: the request of each row of logits, in the order of the rows.
            vocab_size: V. A prompt or a list of stop tokens may hold ids beyond it: a tokenizer can know more tokens
                than the model has logits.
            device: where the logits are.
            ahead: for each request, tokens of its output that are being chosen and are not in it yet; 0 by default.
        """
        names = tuple([request.request_id for request in requests])
        if all([request.params.plain for request in requests]):
            return SamplingRows(names)
        device = torch.device(device)
        banned: list[CellsOfRow] = []
        repeated: list[CellsOfRow] = []
        counted: list[CellsOfRow] = []
        for row, request in enumerate(requests):
            params, output = request.params, request.output_token_ids
            if len(output) + (ahead[row] if ahead else 0) < params.min_tokens:
                banned.append((row, [*params.stop_token_ids, *request.eos_token_ids], 0.0))
            if params.repetition_penalty != 1:  # ids that come twice do no harm: the same cell is set to the same value
                repeated.append((row, [*request.prompt_token_ids, *output], params.repetition_penalty))
            if params.presence_penalty or params.frequency_penalty:
                times = Counter(output)
                amounts = [params.presence_penalty + params.frequency_penalty * n for n in times.values()]
                counted.append((row, list(times), amounts))
        wanted = [request.params.logprobs for request in requests if request.params.logprobs is not None]
        return SamplingRows(
            request_ids=names,
            drawn=Drawn.build(requests, device, ahead),
            banned=Cells.build(banned, vocab_size, device),
            repeated=Cells.build(repeated, vocab_size, device),
            counted=Cells.build(counted, vocab_size, device),
            logprobs=None if not wanted else -1 if -1 in wanted else max(wanted),
        )
