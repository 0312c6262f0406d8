"""Random steps of attention on a paged cache: what checks and benchmarks run the kernels and their peers on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase3_paged_attention.kv_format import FORMATS

KV = tuple[Tensor, ...]
NAN_BYTE = 0x7F  # a NaN in e4m3fn and in e5m2
MOST_NODES = 64  # of a tree
PIECE = 1 << 28  # numbers that are quantised at once


@dataclass(frozen=True)
class Case:
    """One step of attention.

    Attributes:
        lengths: tokens of each sequence, the new ones included.
        new: new tokens of each sequence.
        heads, kv_heads, dim, page: Hq, Hkv, D, P.
        dtype: of queries, and of the cache where `kv_format` is auto.
        kv_format: auto | a name of `kv_format.FORMATS`.
        window, soft_cap: see `AttentionSpec`.
        tree: whether the new tokens are nodes of a random tree, each of which sees its ancestors.
    """

    lengths: tuple[int, ...]
    new: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_format: str = "auto"
    window: int | None = None
    soft_cap: float | None = None
    tree: bool = False

    @property
    def spec(self) -> AttentionSpec:
        """What a backend is told about the layer."""
        cache = self.kv_format
        heads = (self.heads, self.kv_heads, self.dim, self.dim**-0.5)
        return AttentionSpec(*heads, self.window, self.soft_cap, self.dtype, cache)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token."""
        return max(self.new) == 1

    @property
    def is_even(self) -> bool:
        """Whether all sequences are alike, so that no mask is needed beside the causal one."""
        return len(set(self.lengths)) == len(set(self.new)) == 1

    @property
    def bytes(self) -> int:
        """What a step must read and write: visible keys, values and their scales, q and the result."""
        kind = FORMATS.get(self.kv_format)
        side = self.dim * (kind.dtype if kind else self.dtype).itemsize + (4 if kind and kind.per_token else 0)
        window = self.window or max(self.lengths)
        read = sum(min(n, window + new - 1) for n, new in zip(self.lengths, self.new, strict=True))
        return 2 * read * self.kv_heads * side + 2 * sum(self.new) * self.heads * self.dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Multiply-adds, times two, of the pairs of query and key that causality and window leave."""
        counted = zip(self.lengths, self.new, strict=True)
        return 4 * self.heads * self.dim * sum(pairs(length, new, self.window) for length, new in counted)

    def __str__(self) -> str:
        """The row of a table."""
        batch, longest, most = len(self.lengths), max(self.lengths), max(self.new)
        words = [f"B{batch} x {longest}" if self.is_even else f"B{batch} x {min(self.lengths)}..{longest}"]
        words += [f"{self.heads}+{self.kv_heads}x{self.dim}", f"page {self.page}"]
        words += [f"{most} new"] if most > 1 else []
        words += [] if self.kv_format == "auto" else [self.kv_format]
        words += [] if self.window is None else [f"window {self.window}"]
        words += [] if self.soft_cap is None else [f"cap {self.soft_cap:g}"]
        words += ["tree"] if self.tree else []
        words += [] if self.dtype == torch.bfloat16 else [str(self.dtype).removeprefix("torch.")]
        return ", ".join(words)


@dataclass(frozen=True)
class Inputs:
    """A case with its numbers, on a device.

    Attributes:
        q: [T, Hq, D].
        kv: see `kernels.paged.attend`.
        block_tables: [B, n] int32; entries that are not used name a block that belongs to nobody.
        query_start: [B+1] int32.
        seq_lens: [B] int32.
        visible: [T] int64, or None.
    """

    case: Case
    q: Tensor
    kv: KV
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor
    visible: Tensor | None

    @property
    def batch(self) -> Batch:
        """The step as a backend plans it; what attention does not read is zero."""
        case, device = self.case, self.q.device
        none = torch.zeros(self.q.shape[0], dtype=torch.int64, device=device)
        start, lens, tables = self.query_start.long(), self.seq_lens.long(), self.block_tables.long()
        return Batch(none, none, none, start, lens, tables, start[1:] - 1, case.new, case.lengths, case.lengths, ())


def decode(batch: int, length: int, heads: tuple[int, int, int] = (32, 8, 128), **other: Any) -> Case:
    """A step of one new token a sequence; heads are (Hq, Hkv, D)."""
    return extend(batch, length, 1, heads, **other)


def extend(batch: int, length: int, new: int, heads: tuple[int, int, int] = (32, 8, 128), **other: Any) -> Case:
    """A step of so many new tokens in each of `batch` sequences of `length` tokens, those included."""
    return Case((length,) * batch, (new,) * batch, *heads, **other)


def zipf_lengths(batch: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths in the order of a random batch: the one of rank r has longest / r tokens."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(max(1, longest // (rank + 1)) for rank in order)


def make(case: Case, device: str, *, poisoned: bool = False, seed: int = 0) -> Inputs:
    """Numbers for a case: pages in random order, the last of a sequence partly filled.

    Args:
        case: what to make.
        device: where.
        poisoned: every slot that is no token's holds NaN, and so do its scales.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    tables, starts, lengths = pages(case.lengths, case.new, case.page, generator)
    visible = None
    if case.tree:
        bits = [bit for new in case.new for bit in tree_bits(new, generator)]
        visible = torch.tensor(bits, dtype=torch.int64, device=device)
    q, kv = numbers(case, int(tables.max()) + 1, device, seed)
    inputs = Inputs(case, q, kv, tables.to(device), starts.to(device), lengths.to(device), visible)
    if poisoned:
        poison(kv, inputs.block_tables, inputs.seq_lens)
    return inputs


def pages(
    lengths: Sequence[int], new: Sequence[int], page: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of a step whose pages lie in random order.

    Returns:
        Block tables [B, n], query_start [B+1] and seq_lens [B], int32. The last block is nobody's; entries of the table
        that are not used name it, and there is one at least.
    """
    lens = torch.tensor(lengths)
    counts = -(-lens // page)
    total = int(counts.sum())
    tables = torch.full((len(lens), int(counts.max()) + 1), total, dtype=torch.int32)
    tables[torch.arange(tables.shape[1]) < counts[:, None]] = torch.randperm(total, generator=generator).int()
    return tables, torch.tensor((0, *new)).cumsum(0).int(), lens.int()


def pairs(length: int, new: int, window: int | None) -> int:
    """Pairs of query and key of the last `new` of `length` tokens, causal and within a window."""
    window = window or length
    capped = max(0, min(new, length - window))  # the last queries see a whole window
    first, rest = length - new + 1, new - capped  # keys that the first query sees
    return capped * window + rest * first + rest * (rest - 1) // 2


def numbers(case: Case, blocks: int, device: str, seed: int) -> tuple[Tensor, KV]:
    """q and a cache of so many blocks, made on the device; q is a slice of a wider activation, as in a layer."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (blocks, case.page, case.kv_heads, case.dim)
    width = case.heads + 2 * case.kv_heads
    wide = torch.randn(sum(case.new), width, case.dim, generator=generator, device=device, dtype=torch.float32)
    q = wide.to(case.dtype)[:, : case.heads]  # [T, Hq, D]
    if case.kv_format == "auto":
        made = (torch.randn(shape, generator=generator, device=device, dtype=case.dtype) for _ in "kv")
        return q, tuple(made)
    kind = FORMATS[case.kv_format]
    sides, scales = [], []
    for _ in "kv":
        side = torch.empty(shape, dtype=kind.dtype, device=device)
        scale = torch.full((1,), 5 / kind.largest, device=device)
        if kind.per_token:
            scale = torch.empty(shape[:3], device=device)
        step = max(1, PIECE // side[0].numel())
        for first in range(0, blocks, step):
            piece = torch.randn(side[first : first + step].shape, generator=generator, device=device)
            if kind.per_token:
                scale[first : first + step] = kind.scales_of(piece)
            side[first : first + step] = kind.quantise(piece, scale[first : first + step] if kind.per_token else scale)
        sides.append(side)
        scales.append(scale)
    return q, (*sides, *scales)


def more(inputs: Inputs, copies: int) -> list[Inputs]:
    """The inputs and others that differ in q and in what the cache holds, so that one plan serves all."""
    blocks, device = inputs.kv[0].shape[0], str(inputs.q.device)
    others = [numbers(inputs.case, blocks, device, seed) for seed in range(1, copies)]
    return [inputs, *(replace(inputs, q=q, kv=kv) for q, kv in others)]


def poison(kv: KV, block_tables: Tensor, seq_lens: Tensor) -> None:
    """Put NaN wherever the cache, tensors of [blocks, P, ...], holds no token of a sequence."""
    blocks, page = kv[0].shape[:2]
    columns = torch.arange(block_tables.shape[1], device=seq_lens.device)
    left = seq_lens[:, None] - columns * page  # tokens from a page on
    filled = torch.zeros(blocks, dtype=torch.int32, device=seq_lens.device)
    filled[block_tables[left > 0].long()] = left[left > 0].int()
    empty = torch.arange(page, device=seq_lens.device) >= filled[:, None]  # [blocks, P]
    for part in kv:
        if part.dim() < 3:  # one scale for all
            continue
        if part.element_size() == 1:
            part.view(torch.uint8)[empty] = NAN_BYTE
        else:
            part[empty] = float("nan")


def tree_bits(nodes: int, generator: torch.Generator) -> list[int]:
    """For each node of a random tree, itself and its ancestors as bits of an int64."""
    if nodes > MOST_NODES:
        raise ValueError(f"a tree of {nodes} nodes: a mask has bits for {MOST_NODES}")
    seen: list[int] = []
    for node in range(nodes):
        parent = int(torch.randint(node, (), generator=generator)) if node else None
        seen.append(1 << node | (0 if parent is None else seen[parent]))
    return [bits - (1 << 64) if bits >> 63 else bits for bits in seen]
