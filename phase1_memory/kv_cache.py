"""The paged KV cache: memory in blocks of `page` tokens, and the block tables that say whose they are.

Every layer has keys and values of shape [num_blocks, page, Hkv, D], as in vLLM; an 8-bit cache may have scales beside
them. A sequence takes a block when its tokens reach it: at most page - 1 places of a sequence are reserved and unused,
where phase 0 reserved `max_model_len`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from phase0_prototype.cpu_memory import untouched_zeros
from phase0_prototype.kv_spec import KVPart, KVSpec
from phase0_prototype.request import Request
from phase1_memory.block_tables import BlockTables
from phase1_memory.runs import Write


class PagedKVCache:
    """Blocks of keys and values, or of whatever `spec.parts` says that a layer keeps.

    Args:
        spec: what one token needs.
        tables: who owns which block; `tables.page` is the block size.
        device: where the memory lies.

    One block more than the tables know is allocated: what padded rows of a captured step write goes to `scratch`.
    """

    def __init__(self, spec: KVSpec, tables: BlockTables, device: torch.device) -> None:
        self.spec, self.tables, self.device = spec, tables, device
        self.block_size = tables.page
        self.scratch = tables.num_blocks
        shape = (tables.num_blocks + 1, tables.page)

        def blocks(part: KVPart) -> Tensor:  # a tensor of its own: torch.compile copies what is changed through a view
            if device.type == "cpu":
                return untouched_zeros((*shape, *part.shape), part.dtype)
            return torch.zeros(*shape, *part.shape, dtype=part.dtype, device=device)

        self.layers = tuple(tuple(blocks(part) for part in spec.parts) for _ in range(spec.num_layers))
        sides = [side.flatten(1) for side in itertools.chain.from_iterable(self.layers) if side.numel()]
        word = _word([side.nbytes // side.shape[0] for side in sides])
        self._images = tuple(side.view(word) for side in sides)  # [num_blocks + 1, words of a block], numbers or not
        self.copied_blocks = 0  # since the start: what copy-on-write has cost

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.spec.bytes_per_token * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return self.tables.num_free

    def reserve(self, writes: Sequence[Write]) -> bool:
        """Make room for these tokens, copying blocks that are shared; False where not enough blocks are free."""
        copies = self.tables.reserve(writes)
        if copies is None:
            return False
        if copies:
            self.copied_blocks += len(copies)
            source, destination = torch.tensor(copies, dtype=torch.int64).to(self.device).unbind(1)
            for image in self._images:
                image[destination] = image[source]
        return True

    def fork(self, parent: Request, child: Request) -> None:
        """`child` begins with the computed tokens of `parent`, in the same blocks."""
        computed = parent.num_computed_tokens
        child.num_computed_tokens = self.tables.fork(parent.request_id, child.request_id, computed)

    def release(self, request: Request) -> None:
        """Take the request's blocks back."""
        self.tables.release(request.request_id)

    def blocks(self, request: Request) -> tuple[int, ...]:
        """The request's block table."""
        return tuple(self.tables.tables[request.request_id])

    def computed(self, request: Request, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens, all just written, can be read back by the next step: all."""
        return num_tokens

    def spare(self, blocks: tuple[tuple[int, ...], ...], count: int) -> tuple[tuple[int, ...], ...]:
        """Block tables of `count` sequences that are not there, to fill up a batch: they write to `scratch`."""
        return ((self.scratch,),) * count

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """The parts of one layer, keys and values first, each [num_blocks + 1, page, *part.shape]."""
        return self.layers[index]

    def read(self, blocks: Sequence[int]) -> Tensor:
        """A copy of these blocks, all layers together: [n, block_bytes] uint8 on the cache's device."""
        out = torch.empty(len(blocks), self.block_bytes, dtype=torch.uint8, device=self.device)
        where = self._where(blocks)
        for image, place in self._places(out):
            place[...] = image[where]
        return out

    def write(self, blocks: Sequence[int], data: Tensor) -> None:
        """Put what `read` returned into these blocks."""
        where = self._where(blocks)
        for image, place in self._places(data):
            image[where] = place

    def _places(self, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every tensor of every layer, with its part of `data` [n, block_bytes]: [n, words of a block]."""
        start = 0
        for image in self._images:
            end = start + image.shape[1]
            yield image, data.view(image.dtype)[:, start:end]
            start = end

    def _where(self, blocks: Sequence[int]) -> slice | Tensor:
        """Indices of these blocks. One run is copied as it lies; several in one indexed copy: that takes less time than
        a copy for each (benchmark `runs`)."""
        runs = pieces(blocks)
        return runs[0][1] if len(runs) == 1 else torch.tensor(list(blocks), dtype=torch.int64, device=self.device)


def pieces(blocks: Sequence[int]) -> list[tuple[slice, slice]]:
    """Runs of neighbours as (places in the list, blocks)."""
    found: list[tuple[slice, slice]] = []
    at = 0
    for _, group in itertools.groupby(enumerate(blocks), key=lambda item: item[1] - item[0]):
        first, *rest = (block for _, block in group)
        length = 1 + len(rest)
        found.append((slice(at, at + length), slice(first, first + length)))
        at += length
    return found


def _word(sizes: Sequence[int]) -> torch.dtype:
    """The widest integer that blocks of all these bytes are whole numbers of: 8 times fewer elements to copy."""
    words = (torch.int64, torch.int32, torch.int16, torch.uint8)
    return next(word for word in words if all(size % word.itemsize == 0 for size in sizes))
