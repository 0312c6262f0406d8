"""Runs a step on the model: batch, forward, sample. Launched and collected apart, so that a GPU need not be waited for.

`launch` queues everything on the device and returns; `collect` waits for the tokens. A step that was launched on top of
another takes that one's tokens from the device, where they are, and not from the host, which has not seen them yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from module0_profiling.ranges import span
from phase0_prototype.batch import Batch
from phase0_prototype.logprobs import TokenLogprobs, logprobs_of
from phase0_prototype.request import Request
from phase0_prototype.sampler import sample
from phase0_prototype.sampling_rows import SamplingRows
from phase0_prototype.step import Step, StepTokens


@dataclass(frozen=True)
class Launched:
    """A step on its way.

    Attributes:
        step: what runs.
        requests: the sequence of each row that is sampled.
        token_ids: [R] int64 on the device; -1 where none can be chosen.
        copied: the same on the host, once `arrived` says so.
        logprobs: on the host like `copied`.
        prompt_logprobs: as in `StepTokens`.
        arrived: waits for the copies.
    """

    step: Step
    requests: tuple[Request, ...]
    token_ids: Tensor
    copied: Tensor
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[tuple[Request, int, TokenLogprobs], ...]
    arrived: Callable[[], object]


class Executor:
    """Turns steps into tokens.

    Args:
        kv: the cache.
        runner: the model.
        device: where both are.
    """

    def __init__(self, kv: Any, runner: Any, device: torch.device) -> None:
        self.kv, self.runner, self.device = kv, runner, device

    def launch(self, step: Step, before: Launched | None = None) -> Launched:
        """Queue a step; nothing waits for a CUDA device.

        Args:
            step: with something scheduled.
            before: the step that runs now and chooses the tokens that this one's `pending` counts.
        """
        with span("prepare"):
            blocks = [self.kv.blocks(s.request) for s in step.scheduled]
            batch = Batch.build(step, blocks, self.kv.block_size, self.device)
            if before is not None:
                self._fill_in(batch, step, before)
        with span("forward"):
            logits = self.runner.forward(batch)  # [R, V] float32
        with span("sample"):
            logits, prompts = _split_prompts(step, logits)
            logits = _sampling_rows(step, logits)  # [sampling sequences, V]
            requests = step.sampling
            ahead = [s.pending for s in step.scheduled if s.samples for _ in (s.request, *s.forks)]
            sampled = sample(logits, SamplingRows.build(requests, logits.shape[1], self.device, ahead))
            copied = _to_host(sampled.token_ids)
            logprobs = None if sampled.logprobs is None else _logprobs_to_host(sampled.logprobs)
            on_host = tuple((request, start, _logprobs_to_host(found)) for request, start, found in prompts)
        return Launched(step, requests, sampled.token_ids, copied, logprobs, on_host, _arrival(self.device))

    def collect(self, launched: Launched) -> StepTokens:
        """Wait for a step's tokens."""
        launched.arrived()
        count = len(launched.requests)
        return StepTokens(
            launched.step,
            launched.requests,
            range(count),
            launched.copied.tolist(),
            launched.logprobs,
            launched.prompt_logprobs,
        )

    def _fill_in(self, batch: Batch, step: Step, before: Launched) -> None:
        """Write the tokens that the host does not know into the batch, on the device."""
        row_of = {request.request_id: row for row, request in enumerate(before.requests)}
        ends = [end - 1 for end in _ends(step)]
        places = [(end, row_of[s.request.request_id]) for end, s in zip(ends, step.scheduled, strict=True) if s.pending]
        if places:
            index = torch.tensor(places, dtype=torch.int64)
            if self.device.type == "cuda":
                index = index.pin_memory().to(self.device, non_blocking=True)
            to, rows = index.unbind(1)
            batch.token_ids[to] = before.token_ids[rows].clamp(min=0)


def _ends(step: Step) -> list[int]:
    """For each scheduled request, the place after its last token in the batch."""
    total, ends = 0, []
    for scheduled in step.scheduled:
        total += scheduled.num_tokens
        ends.append(total)
    return ends


def _sampling_rows(step: Step, logits: Tensor) -> Tensor:
    """One row for each sequence that samples: forks share the row of the request that computed it."""
    copies = [1 + len(s.forks) for s in step.scheduled if s.samples]
    if len(copies) == sum(copies):
        return logits
    return logits.repeat_interleave(torch.tensor(copies, device=logits.device), dim=0)


def _split_prompts(step: Step, logits: Tensor) -> tuple[Tensor, list[tuple[Request, int, TokenLogprobs]]]:
    """The rows that tokens are sampled from, and the log-probabilities of prompts that asked for them."""
    if all(s.request.params.prompt_logprobs is None for s in step.scheduled):
        return logits, []
    keep, start, prompts = [], 0, []
    for scheduled in step.scheduled:
        request = scheduled.request
        wants_prompt = request.params.prompt_logprobs is not None and not request.output_token_ids
        count = scheduled.num_tokens if wants_prompt else int(scheduled.samples)
        if wants_prompt:
            known = request.tokens(scheduled.start + 1, scheduled.end + 1)  # what each row should have predicted
            targets = torch.tensor(known, dtype=torch.int64, device=logits.device)
            predicted = logits[start : start + len(known)]
            found = logprobs_of(predicted, targets, request.params.prompt_logprobs or 0)
            prompts.append((request, scheduled.start + 1, found))
        if scheduled.samples:
            keep.append(start + count - 1)
        start += count
    return logits[keep], prompts


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory, which a CUDA device has written when the event of `_arrival` has passed."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _logprobs_to_host(logprobs: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(*(_to_host(getattr(logprobs, f.name)) for f in fields(TokenLogprobs)))


def _arrival(device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
