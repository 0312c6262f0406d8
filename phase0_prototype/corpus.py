"""The text that the project's own models learn: Python's standard library, read from the interpreter that runs this.

Every machine that has Python has the corpus, so nothing is downloaded. Files are split by a hash of their *path*: a
file that is held out here is held out on every machine and for every Python version, whatever its contents became.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Ids 0..15. All but the first are untrained here: later phases need them (chat, tools, images) as they are.
SPECIAL_TOKENS = [END_OF_TEXT, "<|pad|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|tool|>"]
SPECIAL_TOKENS += [f"<|reserved_{i}|>" for i in range(len(SPECIAL_TOKENS), 16)]

HELD_OUT_PERCENT = 5
TEST_FILES_PERCENT = 50  # unit tests are 60 % of the library's text and repeat themselves: half of them is enough
# Tables rather than prose, and packages that are not the standard library.
_SKIPPED_DIRECTORIES = {
    "encodings",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "idle_test",
    "__pycache__",
}


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, and its text."""

    path: str
    text: str


def _bucket(path: str, salt: str) -> int:
    """A number in 0..99 that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{path}".encode()).digest()[:8], "little") % 100


def is_held_out(path: str) -> bool:
    """Whether the file at this path (relative to the standard library, with '/') is never trained on."""
    return _bucket(path, "held-out") < HELD_OUT_PERCENT


def _python_files(root: Path) -> list[str]:
    paths = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [d for d in subdirectories if d not in _SKIPPED_DIRECTORIES]
        paths += [(Path(directory) / f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    return sorted(paths)


def documents(*, held_out: bool, root: Path | None = None) -> Iterator[Document]:
    """The corpus' files in order of path.

    Args:
        held_out: the 5 % that is never trained on, or the rest.
        root: a directory of .py files; by default this interpreter's standard library.

    Raises:
        FileNotFoundError: there is no standard library source at `root`.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = False
    for path in _python_files(root):
        is_test = path.startswith("test/") or "/test/" in path or "/tests/" in path
        if is_held_out(path) != held_out:
            continue
        if is_test and _bucket(path, "tests") >= TEST_FILES_PERCENT:
            continue
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # deliberately broken fixtures of the library's own tests
        if text.strip():
            found = True
            yield Document(path, text)
    if not found:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise FileNotFoundError(f"no Python sources under {root}: install the standard library of Python {version}")


def train_tokenizer(texts: Iterator[str], vocab_size: int = 4096) -> Tokenizer:
    """A byte-level BPE tokenizer (GPT-2's splitting) whose first 16 ids are `SPECIAL_TOKENS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, docs: list[Document]) -> list[npt.NDArray[np.uint16]]:
    """Each document's token ids, ended by `END_OF_TEXT`."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch([doc.text for doc in docs], add_special_tokens=False)
    return [np.array([*e.ids, end], dtype=np.uint16) for e in encoded]
