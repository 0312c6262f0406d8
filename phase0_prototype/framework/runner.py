"""Runs the model on a batch, launching every operation from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phase0_prototype.batch import Batch

if TYPE_CHECKING:
    from .kv_cache import KVCache
    from .model import DecoderModel


class Runner:
    """Eager: every operation is launched from Python.

    Attributes:
        forward_tokens: tokens processed since the start, the count that the cache gate reads.
        forward_passes: forward passes since the start.
    """

    def __init__(self, model: DecoderModel, kv: KVCache) -> None:
        self.model, self.kv = model, kv
        self.forward_tokens = 0
        self.forward_passes = 0

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [R, V] in float32 of the batch's wanted rows."""
        self.forward_tokens += batch.num_tokens
        self.forward_passes += 1
        return self._logits(batch).float()

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(batch, self.kv)


# TASK 0.3: make "compile" a runner whose decode steps go through torch.compile, in so few shapes that it does not
# compile again at every token; and "cuda-graph" one that records a decode step on a GPU once and replays it.
RUNNERS: dict[str, Callable[[DecoderModel, KVCache], Runner]] = {
    "eager": Runner,
    "compile": Runner,
    "cuda-graph": Runner,
}
