"""Runs the model on a batch: eagerly, compiled, or as a captured CUDA graph. All three compute the same thing.

A decode step of a small model is hundreds of tiny operations: Python and kernel launches take longer than the
arithmetic. torch.compile fuses them into a few C++ or Triton functions; a CUDA graph replays all launches at once. Both
want shapes that repeat, so they take decode steps only (one token a sequence), padded to a few batch sizes, and read
the cache in multiples of `LENGTH_STEP`; prompts run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase0_prototype import matvec
from phase0_prototype.batch import Batch
from phase0_prototype.kv_cache import KVCache
from phase0_prototype.model import DecoderModel

LENGTH_STEP = 256


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


class CompiledRunner(Runner):
    """torch.compile for decode steps. Each (batch size, cache length) compiles once and takes seconds."""

    def __init__(self, model: DecoderModel, kv: KVCache) -> None:
        super().__init__(model, kv)
        matvec.prepare()
        self.attention = model.backend.steady(LENGTH_STEP)
        # Shapes are fixed by the guards; checking them again before every function costs 7 % of a small model's step.
        self._compute = torch.compile(model.compute, dynamic=False, fullgraph=True, options={"size_asserts": False})

    def _logits(self, batch: Batch) -> Tensor:
        if not is_decode(batch):
            return super()._logits(batch)
        wide = padded(batch, self.kv)
        plan = self.attention.plan(wide, self.model.windows, self.kv.block_size)
        if plan.shape is None:  # rows are not adjacent
            return super()._logits(batch)
        with torch._dynamo.config.patch(cache_size_limit=64):
            logits = self._compute(wide.token_ids, self.model.rotary.places(wide), wide.logits_rows, plan, self.kv)
        return logits[: batch.num_seqs]


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    logits: Tensor


class GraphRunner(Runner):
    """CUDA graphs for decode steps: captured at the first use of a (batch size, cache length), replayed afterwards."""

    def __init__(self, model: DecoderModel, kv: KVCache) -> None:
        super().__init__(model, kv)
        self.attention = model.backend.steady(LENGTH_STEP)
        self._graphs: dict[tuple[int, ...], _Captured] = {}

    def _logits(self, batch: Batch) -> Tensor:
        if not is_decode(batch):
            return super()._logits(batch)
        wide = padded(batch, self.kv)
        plan = self.attention.plan(wide, self.model.windows, self.kv.block_size)
        if plan.shape is None:
            return super()._logits(batch)
        inputs = (wide.token_ids, self.model.rotary.places(wide), wide.logits_rows, *plan.tensors)
        captured = self._graphs.get(plan.shape)
        if captured is None:
            captured = self._graphs[plan.shape] = self._capture(inputs, plan)
        for static, value in zip(captured.inputs, inputs, strict=True):
            static.copy_(value)
        captured.graph.replay()
        return captured.logits[: batch.num_seqs]

    def _capture(self, inputs: tuple[Tensor, ...], plan: Any) -> _Captured:
        static = tuple(t.clone() for t in inputs)
        static_plan = plan.with_tensors(static[3:])

        def step() -> Tensor:
            return self.model.compute(static[0], static[1], static[2], static_plan, self.kv)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # library handles and workspaces are created outside the capture
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        return _Captured(graph, static, logits)


def is_decode(batch: Batch) -> bool:
    """Whether every sequence brings one token and wants its logits."""
    return batch.num_tokens == batch.num_seqs == batch.logits_rows.shape[0]


@torch.inference_mode(False)  # inference tensors would differ from those of an unpadded batch: a second compilation
def padded(batch: Batch, kv: KVCache) -> Batch:
    """A decode batch brought to a power of two of sequences: 32 that end one by one meet 6 shapes instead of 32.

    What is added are sequences of one token, in memory that the cache can spare; their logits are dropped. Where it has
    none, the batch stays as it is.
    """
    size = 1 << (batch.num_seqs - 1).bit_length()
    spare = kv.spare(batch.blocks, size - batch.num_seqs)
    if not spare:
        return batch
    device, block_size = batch.token_ids.device, kv.block_size

    def widen(tensor: Tensor, values: Iterable[int]) -> Tensor:
        return torch.cat((tensor, torch.tensor(list(values), dtype=torch.int64, device=device)))

    zeros, ones = (0,) * len(spare), (1,) * len(spare)
    tables = torch.tensor(spare, dtype=torch.int64, device=device)  # [spare, 1]
    return Batch(
        token_ids=widen(batch.token_ids, zeros),
        positions=widen(batch.positions, zeros),
        slot_mapping=widen(batch.slot_mapping, (table[0] * block_size for table in spare)),
        query_start=torch.arange(size + 1, device=device),
        seq_lens=widen(batch.seq_lens, ones),
        block_tables=torch.cat((batch.block_tables, tables.expand(-1, batch.block_tables.shape[1]))),
        logits_rows=torch.arange(size, device=device),
        query_lens=batch.query_lens + ones,
        kv_lens=batch.kv_lens + ones,
        prompt_lens=batch.prompt_lens + ones,
        blocks=batch.blocks + spare,
    )


RUNNERS: dict[str, Callable[[DecoderModel, KVCache], Runner]] = {
    "eager": Runner,
    "compile": CompiledRunner,
    "cuda-graph": GraphRunner,
}
