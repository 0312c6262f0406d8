"""What one forward pass works on: a `Step` (step.py) says which tokens of which requests, a `Batch` is it as tensors.

A batch is flat: the tokens of all sequences one after another, with no padding and no flag for prefill or decode. A
prompt of 500 tokens and a decode of one are rows of 500 and 1; linear layers never see a token that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phase0_prototype.step import Step


@dataclass(frozen=True)
class Batch:
    """One forward pass as tensors. T tokens, B sequences, R rows that need logits.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, position of each token in its sequence.
        slot_mapping: [T] int64, where the token's keys and values go in the flattened cache.
        query_start: [B+1] int64, sequence b owns tokens query_start[b] .. query_start[b+1]-1.
        seq_lens: [B] int64, tokens of each sequence after this step, those in the cache included.
        block_tables: [B, blocks] int64, the cache blocks of each sequence (phase 0: its one row).
        logits_rows: [R] int64, tokens (indices into T) whose logits are wanted.
        query_lens, kv_lens, blocks: the same numbers on the host, so that planning never waits for the device.
        prompt_lens: tokens of each sequence's prompt.
        last: sequences whose last token `logits_rows` names, where it names nothing else; None: it does.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    logits_rows: Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    last: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        """B."""
        return len(self.query_lens)

    @staticmethod
    def build(step: Step, blocks: list[tuple[int, ...]], block_size: int, device: torch.device) -> Batch:
        """Flatten a step.

        Args:
            step: what to run.
            blocks: the cache blocks of each scheduled request, in the step's order.
            block_size: tokens in a block.
            device: where the tensors go, in one copy.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        wanted: list[int] = []
        last: list[int] = []
        for seq, (scheduled, table) in enumerate(zip(step.scheduled, blocks, strict=True)):
            token_ids += scheduled.request.tokens(scheduled.start, scheduled.end)
            token_ids += (0,) * scheduled.pending  # not known yet: the executor writes it
            positions += range(scheduled.start, scheduled.end)
            slots += [
                table[p // block_size] * block_size + p % block_size for p in range(scheduled.start, scheduled.end)
            ]
            if scheduled.request.params.prompt_logprobs is not None and not scheduled.request.output_token_ids:
                wanted += range(starts[-1], starts[-1] + scheduled.num_tokens)
            elif scheduled.samples:
                wanted.append(starts[-1] + scheduled.num_tokens - 1)
                last.append(seq)
            starts.append(starts[-1] + scheduled.num_tokens)
        kv_lens = [s.end for s in step.scheduled]
        width = max(map(len, blocks))
        tables = [b + (0,) * (width - len(b)) for b in blocks]
        parts = [token_ids, positions, slots, starts, kv_lens, wanted, [t for row in tables for t in row]]
        flat = torch.tensor([x for part in parts for x in part], dtype=torch.int64)
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        ids, pos, slot_mapping, query_start, seq_lens, rows, table = flat.split([len(p) for p in parts])
        return Batch(
            ids,
            pos,
            slot_mapping,
            query_start,
            seq_lens,
            table.view(len(blocks), width),
            rows,
            tuple(s.num_tokens for s in step.scheduled),
            tuple(kv_lens),
            tuple(len(s.request.prompt_token_ids) for s in step.scheduled),
            tuple(blocks),
            tuple(last) if len(last) == len(wanted) else None,
        )

    def last_tokens(self) -> Batch:
        """The last tokens that are wanted, as if all others had been computed before; needs `last`."""
        assert self.last
        rows, size = self.logits_rows, len(self.last)
        counts = torch.arange(size + 1, device=rows.device)
        seq_lens, tables = self.seq_lens, self.block_tables
        if size < self.num_seqs:
            which = torch.tensor(self.last, device=rows.device)
            seq_lens, tables = seq_lens[which], tables[which]
        return Batch(
            self.token_ids[rows],
            self.positions[rows],
            self.slot_mapping[rows],
            counts,
            seq_lens,
            tables,
            counts[:-1],
            (1,) * size,
            tuple(self.kv_lens[i] for i in self.last),
            tuple(self.prompt_lens[i] for i in self.last),
            tuple(self.blocks[i] for i in self.last),
            tuple(range(size)),
        )
