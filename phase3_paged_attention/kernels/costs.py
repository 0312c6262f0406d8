"""What a decode of one layer must move, from first principles: the ladder's rungs, and attention as torch writes it.

Bytes are those that kernels ask for. Where programs ask for the same bytes at one time a cache answers the repeats, and
memory gives between `minimum` and `requested`. Operations of torch run one after the other on tensors larger than any
cache, so each tensor goes to memory and comes back from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax

FLOAT32 = INT32 = 4  # bytes
INT64 = 8


@dataclass(frozen=True)
class Decode:
    """One new token for each of B sequences.

    Attributes:
        lengths: tokens of each sequence.
        heads, kv_heads, dim: Hq, Hkv and D.
        itemsize: bytes of a number of q, keys and values.
        page: tokens of a block.
    """

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    itemsize: int = 2
    page: int = 16

    @classmethod
    def even(cls, batch: int, context: int, heads: int, kv_heads: int, dim: int, itemsize: int = 2) -> Decode:
        """All sequences of one length."""
        return cls((context,) * batch, heads, kv_heads, dim, itemsize)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return sum(self.lengths)

    @property
    def gathered(self) -> int:
        """Tokens of a sequence once torch has gathered all to the longest, whole pages."""
        return _up(max(self.lengths), self.page) * self.page

    @property
    def cached(self) -> int:
        """Bytes of the keys of all sequences, or of the values."""
        return self.tokens * self.kv_heads * self.dim * self.itemsize

    @property
    def queries(self) -> int:
        """Bytes of q, or of the result."""
        return self.batch * self.heads * self.dim * self.itemsize


def minimum(case: Decode) -> int:
    """Bytes that no kernel can do without: keys and values once, q and the result once."""
    return 2 * case.cached + 2 * case.queries


def flops(case: Decode) -> int:
    """Of both products; a multiply-add is two."""
    return 4 * case.tokens * case.heads * case.dim


def floor_seconds(case: Decode, bandwidth: float) -> float:
    """Time of the minimum at so many bytes a second."""
    return minimum(case) / bandwidth


def requested(rung: str, case: Decode, *, splits: int = 1, block_n: int = 64) -> dict[str, int]:
    """Bytes that a rung of `kernels.decode_ladder` asks for, by tensor, stores included.

    Args:
        rung: of its `RUNGS`.
        case: the step.
        splits, block_n: of the launch; they matter to "split" alone, whose ranges are multiples of block_n.

    Raises:
        ValueError: an unknown rung.
    """
    group = case.heads // case.kv_heads
    a_head, a_kv_head = ("naive", "online", "tiled"), ("packed", "split")
    if rung not in (*a_head, *a_kv_head):
        raise ValueError(f"no rung {rung!r}: there are {', '.join((*a_head, *a_kv_head))}")
    programs = case.heads if rung in a_head else case.kv_heads  # of a sequence, or of each of its ranges
    times = group if rung in a_head else 1  # that the same key is asked for
    passes = 2 if rung == "naive" else 1
    by_page = sum(_up(length, case.page) for length in case.lengths)
    entries = by_page if rung in ("naive", "online") else case.tokens  # of the tables, that one program reads
    found = {
        "q": case.queries,
        "keys": passes * times * case.cached,
        "values": times * case.cached,
        "lengths": INT32 * case.batch * programs,
        "tables": INT32 * passes * entries * programs,
        "out": case.queries,
    }
    if rung == "split":
        real = sum(_ranges(length, splits, block_n) for length in case.lengths)
        found["q"] = real * case.heads * case.dim * case.itemsize
        found["lengths"] *= splits
        found["sums"] = 2 * FLOAT32 * real * case.heads * case.dim  # written, and read by the merge
        found["lse"] = 2 * FLOAT32 * case.batch * splits * case.heads
    return found


def _ranges(length: int, splits: int, block_n: int) -> int:
    """Splits of a sequence that are not empty."""
    chunk = _up(_up(length, splits), block_n) * block_n
    return _up(length, chunk)


def _up(size: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-size // by)


@dataclass(frozen=True)
class Operation:
    """One kernel of torch: bytes that it reads and writes."""

    name: str
    read: int
    written: int

    @property
    def moved(self) -> int:
        """Both."""
        return self.read + self.written


def unfused(case: Decode) -> tuple[Operation, ...]:
    """The operations of `unfused_attention` on a GPU, in their order. The mask is made once for all layers."""
    side = case.batch * case.gathered * case.kv_heads * case.dim * case.itemsize  # gathered keys, padded
    wide = side * case.heads // case.kv_heads  # the same for each query head
    numbers = case.batch * case.heads * case.gathered
    scores, mask = numbers * case.itemsize, case.batch * case.gathered * case.itemsize
    return (
        *_gathers(case, side),
        Operation("repeat keys", side, wide),
        Operation("repeat values", side, wide),
        Operation("q K^T", case.queries + wide, scores),
        Operation("scale", scores, scores),
        Operation("mask", scores + mask, scores),
        Operation("softmax", scores, numbers * FLOAT32),
        Operation("round", numbers * FLOAT32, scores),
        Operation("P V", scores + wide, case.queries),
    )


def gathered_sdpa(case: Decode) -> tuple[Operation, ...]:
    """The operations of `gathered_attention` on a GPU: what is left once the rest of `unfused` is one kernel."""
    side = case.batch * case.gathered * case.kv_heads * case.dim * case.itemsize
    mask = case.batch * case.gathered * case.itemsize
    return (*_gathers(case, side), Operation("attention", case.queries + 2 * side + mask, case.queries))


def total(operations: tuple[Operation, ...]) -> int:
    """Bytes of all of them."""
    return sum(operation.moved for operation in operations)


def _gathers(case: Decode, side: int) -> tuple[Operation, Operation]:
    tables = INT64 * case.batch * case.gathered // case.page
    return Operation("gather keys", side + tables, side), Operation("gather values", side + tables, side)


def unfused_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """As `transformers` writes it (`eager_attention_forward`), behind a gather of the pages.

    Args:
        q: [B, Hq, D].
        keys, values: [blocks, P, Hkv, D].
        block_tables: [B, n] int64; what lies behind a sequence's length is finite, as it is multiplied by 0.
        mask: [B, 1, 1, n * P] of q's type, 0 or the least number.
        scale: of the scores.

    Returns:
        [B, Hq, D].
    """
    group = q.shape[1] // keys.shape[2]
    key, value = (_expanded(side[block_tables].flatten(1, 2), group) for side in (keys, values))  # [B, Hq, S, D]
    scores = torch.matmul(q.unsqueeze(2), key.transpose(2, 3)) * scale + mask  # [B, Hq, 1, S]
    weights = softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, value).squeeze(2)


def gathered_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """As `unfused_attention`, in one kernel behind the gather; the heads of a KV head are rows of its queries."""
    batch, heads, dim = q.shape
    key, value = (side[block_tables].flatten(1, 2).transpose(1, 2) for side in (keys, values))  # [B, Hkv, S, D]
    grouped = q.view(batch, keys.shape[2], -1, dim)  # [B, Hkv, G, D]
    return sdpa(grouped, key, value, attn_mask=mask, scale=scale).reshape(batch, heads, dim)


def length_mask(seq_lens: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, tokens]: 0 for what a sequence has, the least number of `dtype` behind it."""
    behind = torch.arange(tokens, device=seq_lens.device) >= seq_lens.unsqueeze(1)
    return torch.zeros(behind.shape, dtype=dtype, device=seq_lens.device).masked_fill_(behind, torch.finfo(dtype).min)[
        :, None, None
    ]


def _expanded(side: Tensor, group: int) -> Tensor:
    """[B, S, Hkv, D] -> [B, Hq, S, D], each KV head repeated for its query heads (`repeat_kv`)."""
    batch, tokens, kv_heads, dim = side.shape
    repeated = side.transpose(1, 2).unsqueeze(2).expand(batch, kv_heads, group, tokens, dim)
    return repeated.reshape(batch, kv_heads * group, tokens, dim)
