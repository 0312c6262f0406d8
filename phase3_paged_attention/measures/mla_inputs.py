"""Random steps of attention to latents on a paged cache, and how wrong a result of it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from module0_profiling.course.parts import Use, resolve
from phase3_paged_attention.kernels.reference import visible_keys
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.measures.attention_errors import judge
from phase3_paged_attention.measures.attention_inputs import pages, pairs, poison, tree_bits
from phase3_paged_attention.measures.attention_steps import ROOM, SOLUTION, Prepared
from phase3_paged_attention.measures.attention_timing import Workload

ROUNDINGS = 2  # to q's type, of the weights and of the result
STEPS = 256  # roundings to float32 that may add up: a score is a sum of 576 products
PIECE = 1 << 26  # numbers that are packed at once
CHECKED = 2  # sequences of a step that is too large to be checked whole


@dataclass(frozen=True)
class LatentCase:
    """One step of latent attention, absorbed.

    Attributes:
        lengths: tokens of each sequence, the new ones included.
        new: new tokens of each sequence.
        heads, latent, rope, page: H, L, R, P.
        dtype: of queries, and of the cache where it is not packed.
        packed: whether the cache is FP8, as `PackedLatents` lays it out.
        tree: whether new tokens see their ancestors in a random tree only.
    """

    lengths: tuple[int, ...]
    new: tuple[int, ...]
    heads: int = 128
    latent: int = 512
    rope: int = 64
    page: int = 64
    dtype: torch.dtype = torch.bfloat16
    packed: bool = False
    tree: bool = False

    @property
    def scale(self) -> float:
        """Of the scores: a key of DeepSeek-V3 has a quarter of the latent's numbers, and the rotary ones."""
        return float((self.latent // 4 + self.rope) ** -0.5)

    @property
    def format(self) -> PackedLatents:
        """Of packed entries."""
        return PackedLatents(self.latent, self.rope, self.dtype)

    @property
    def entry_bytes(self) -> int:
        """Of a token in the cache."""
        return self.format.entry_bytes if self.packed else (self.latent + self.rope) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """What a step must read and write: entries once, queries and sums."""
        query = (2 * self.latent + self.rope) * self.heads * self.dtype.itemsize
        return sum(self.lengths) * self.entry_bytes + sum(self.new) * query

    @property
    def flops(self) -> int:
        """Multiply-adds, times two, of the pairs of query and key that causality leaves."""
        seen = sum(pairs(length, new, None) for length, new in zip(self.lengths, self.new, strict=True))
        return 2 * (2 * self.latent + self.rope) * self.heads * seen

    def __str__(self) -> str:
        """The row of a table."""
        words = [f"B{len(self.lengths)} x {max(self.lengths)}", f"{self.heads} heads", f"page {self.page}"]
        words += [f"{max(self.new)} new"] if max(self.new) > 1 else []
        words += ["FP8"] if self.packed else []
        words += ["tree"] if self.tree else []
        words += [] if self.dtype == torch.bfloat16 else [str(self.dtype).removeprefix("torch.")]
        return ", ".join(words)


@dataclass(frozen=True)
class LatentInputs:
    """A case with its numbers: q [T, H, L + R], cache [blocks, P, 1, L + R] or packed, tables as in `Inputs`."""

    case: LatentCase
    q: Tensor
    cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor
    visible: Tensor | None = None

    @property
    def kv(self) -> tuple[Tensor]:
        """The cache, as those who time it hand it on."""
        return (self.cache,)


def decode(batch: int, length: int, heads: int, **other: Any) -> LatentCase:
    """A step of one new token a sequence."""
    return LatentCase((length,) * batch, (1,) * batch, heads, **other)


def make(case: LatentCase, device: str, *, poisoned: bool = False, seed: int = 0) -> LatentInputs:
    """Numbers for a case, pages in random order; `poisoned`: NaN in every slot that is no token's."""
    generator = torch.Generator().manual_seed(seed)
    tables, starts, lengths = (t.to(device) for t in pages(case.lengths, case.new, case.page, generator))
    bits = [bit for new in case.new for bit in tree_bits(new, generator)] if case.tree else None
    visible = None if bits is None else torch.tensor(bits, dtype=torch.int64, device=device)
    q, cache = numbers(case, int(tables.max()) + 1, device, seed)
    if poisoned:
        if case.packed:  # a byte of 0x7F is NaN in e4m3; scales and rotary keys of such bytes are large numbers
            cache_nan = cache.view(torch.float8_e4m3fn)
            poison((cache_nan,), tables, lengths)
        else:
            poison((cache,), tables, lengths)
    return LatentInputs(case, q, cache, tables, starts, lengths, visible)


def numbers(case: LatentCase, blocks: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Queries, and a cache of so many blocks."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=case.dtype)
    q = normal(sum(case.new), case.heads, case.latent + case.rope)
    if not case.packed:
        return q, normal(blocks, case.page, 1, case.latent + case.rope)
    cache = torch.empty(blocks, case.page, 1, case.format.entry_bytes, dtype=torch.uint8, device=device)
    step = max(1, PIECE // (case.page * (case.latent + case.rope)))
    for first in range(0, blocks, step):
        some = cache[first : first + step]
        made = normal(some.shape[0] * case.page, case.latent + case.rope)
        some.copy_(case.format.pack(made[:, : case.latent], made[:, case.latent :]).view(some.shape))
    return q, cache


def more(inputs: LatentInputs, copies: int) -> list[LatentInputs]:
    """The inputs, and others that one plan serves."""
    blocks, device = inputs.cache.shape[0], str(inputs.q.device)
    made = (numbers(inputs.case, blocks, device, seed) for seed in range(1, copies))
    return [inputs, *(replace(inputs, q=q, cache=cache) for q, cache in made)]


def ours(inputs: LatentInputs, use: Use | None = None) -> Prepared:
    """The kernel as a step launches it: one list of work, for tiles of all sequences alike."""
    mla, work = (resolve(ROOM, part, use or SOLUTION) for part in ("kernels.mla", "work"))
    case, device = inputs.case, inputs.q.device
    sizes = {"scale": case.scale, "latent": case.latent, "rope": case.rope}

    def plan() -> Any:
        cut = mla.cut_for(case.heads, max(case.new), case.dtype, case.packed, device)
        heads = {"group": cut.group, "kv_heads": cut.head_tiles, "window": None, "block_n": cut.block_n}
        lens = (case.new, case.lengths)
        return work.plan_work(*lens, **heads, programs=cut.programs, tokens=cut.tokens, device=device)

    planned = plan()
    return Prepared(plan, lambda q, kv: lambda: mla.attend_latents(q, kv[0], inputs, planned, **sizes))


def exact(inputs: LatentInputs, sequences: range) -> tuple[Tensor, Tensor, slice]:
    """Of some neighbouring sequences: sums of latents in float64, how far a result may be off, and their rows."""
    case, start = inputs.case, inputs.query_start.tolist()
    parts = []
    for b in sequences:
        rows, length = slice(start[b], start[b + 1]), case.lengths[b]
        entries = inputs.cache[inputs.block_tables[b, : -(-length // case.page)].long()].flatten(0, 2)[:length]
        entries = (case.format.unpack(entries) if case.packed else entries).double()  # [S, L + R]
        bits = None if inputs.visible is None else inputs.visible[rows]
        seen = visible_keys(case.new[b], length, None, bits, inputs.q.device)
        scores = torch.einsum("thd,sd->hts", inputs.q[rows].double(), entries) * case.scale
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)  # [H, T, S]
        known = entries[:, : case.latent]
        parts.append([torch.einsum("hts,sl->thl", weights, side) for side in (known, known.abs())])
    units = ROUNDINGS * torch.finfo(case.dtype).eps / 2 + STEPS * torch.finfo(torch.float32).eps / 2
    whole, sizes = (torch.cat([part[side] for part in parts]) for side in (0, 1))
    return whole, units * sizes, slice(start[sequences.start], start[sequences.stop])


def check(name: str, got: Tensor, inputs: LatentInputs, exactly: bool) -> None:
    """Compare the last sequences with float64. Raises CheckFailed."""
    batch = len(inputs.case.new)
    expected, allowed, rows = exact(inputs, range(max(0, batch - CHECKED), batch))
    judge(name, got.view(-1, *expected.shape[1:])[rows], expected, allowed, exactly, str(inputs.case))


WORKLOAD = Workload(make, more, check)
