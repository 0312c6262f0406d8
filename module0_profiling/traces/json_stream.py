"""Reads the events of a large JSON file one by one, in the memory of a few of them.

`json.load` of a 100 MB trace takes a gigabyte. Here the text passes through a buffer: values are decoded at its front
by the standard decoder, and what was decoded is dropped.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20
PIECE = 1 << 13
LONGEST_VALUE = 16 << 20  # characters; an event has a few hundred, one with this many is no event


class JsonStreamError(ValueError):
    """The text ended early or stopped being JSON; the message says which."""


class JsonStream:
    """Values at the front of a JSON text.

    Args:
        file: the text; read in chunks of a megabyte.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._buffer, self._at, self._ended = file, "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            rest = len(self._buffer)
            while self._at < rest and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < rest or not self._more(CHUNK):
                return self._buffer[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        """Pass one character.

        Raises:
            JsonStreamError: it is another one.
        """
        found = self.peek()
        if found != expected:
            raise self._broken(f"{expected!r} expected")
        self._at += 1

    def value(self) -> Any:
        """Decode the next value.

        Raises:
            JsonStreamError: the text ends within it, or it is no JSON.
        """
        self.peek()
        wanted = CHUNK
        while True:
            try:
                found, end = self._decode(self._buffer, self._at)
            except (json.JSONDecodeError, RecursionError):
                found, end = None, -1
            if end >= 0 and (end < len(self._buffer) or self._ended):  # at the end a number may go on
                self._at = end
                return found
            too_long = len(self._buffer) - self._at > LONGEST_VALUE
            if (too_long or not self._more(wanted)) and end < 0:
                raise self._broken("a value expected")
            wanted *= 2  # a long value is tried a few times, not once a megabyte

    def array(self) -> Iterator[Any]:
        """Decode the elements of an array one by one.

        Raises:
            JsonStreamError: the text ends within it, or it is no JSON.
        """
        self.take("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self._at += 1
                return
            self.take(",")

    def _more(self, size: int) -> bool:
        """Read on; False when there is nothing more."""
        if self._ended:
            return False
        pieces = [self._buffer[self._at :]]
        wanted = len(pieces[0]) + size
        try:
            while size > 0 and (piece := self._file.read(min(size, PIECE))):
                pieces.append(piece)
                size -= len(piece)
        except (EOFError, OSError, zlib.error):  # a gzip file that was cut off: only the last piece is lost
            self._ended = True
        self._buffer, self._at = "".join(pieces), 0
        self._ended = self._ended or len(self._buffer) < wanted
        return len(pieces) > 1

    def _broken(self, wanted: str) -> JsonStreamError:
        rest = self._buffer[self._at : self._at + 24]
        ended = self._ended and len(self._buffer) - self._at < LONGEST_VALUE
        return JsonStreamError("the file ends in the middle" if ended else f"{wanted} at {rest!r}")
