"""Text to token ids and back: the checkpoint's own tokenizer.json through the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from phase0_prototype.errors import CheckpointError


class Tokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        CheckpointError: the file is broken.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._rust = RustTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} is not a tokenizer: {str(error).splitlines()[0]}") from None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._rust.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts around it (Llama's <s>)."""
        return self._rust.encode(text, add_special_tokens=True).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._rust.decode(ids, skip_special_tokens=skip_special_tokens)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint's directory; None if there is none (random checkpoints: prompts are token ids).

    Raises:
        CheckpointError: there is one that this engine can't read.
    """
    if (directory / "tokenizer.json").is_file():
        return Tokenizer(directory / "tokenizer.json")
    if (directory / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{directory} has tokenizer.model only: convert it with transformers' AutoTokenizer(...).save_pretrained"
        )
    return None
