"""What is said about blocks: what a sequence is about to write, what requests want, runs of blocks, an allocator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Run(NamedTuple):
    """Blocks start .. start + length - 1."""

    start: int
    length: int


class Want(NamedTuple):
    """How many blocks a request needs more, and the last block that it has (-1: it has none).

    `after` is a wish, not a right: an allocator doesn't know who holds what. Whatever block it names, the one behind it
    is taken if that is free, and nothing else follows from it.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a want for
    after: int = -1


@dataclass(frozen=True)
class Write:
    """A sequence is about to write its tokens start .. end - 1."""

    name: str
    start: int
    end: int


class Allocator(Protocol):
    """What the block manager needs."""

    num_blocks: int

    @property
    def num_free(self) -> int:
        """Free blocks."""
        ...

    def step(self, release: Sequence[Run], wanted: Sequence[Want]) -> list[list[Run] | None]:
        """Take back `release`, then serve `wanted` in order: each whole, or not at all where not enough is free (None).

        Raises:
            ValueError: blocks are released that are not in use, or fewer than 0 are wanted. Nothing has changed then.
        """
        ...

    def largest_free_run(self) -> int:
        """Blocks of the longest run that could be given in one piece; 0 when nothing is free."""
        ...


def refusal(what: Run | Want, num_blocks: int) -> str:
    """Why an allocator refuses a release or a want, in one line."""
    if isinstance(what, Want):
        return f"wanted {what.count} blocks: give 0 or more"
    if what.length < 1 or what.start < 0 or what.start + what.length > num_blocks:
        return f"released {what}: not within the {num_blocks} blocks"
    return f"released {what}: some of it is not in use, or is released twice"
