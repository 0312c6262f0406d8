"""Text from tokens while they arrive: only whole characters, and nothing that has to be taken back.

Tokens are not text. A character can be spread over several tokens (bytes), and the first word of a decode loses its
leading space in SentencePiece vocabularies. So a short window of recent tokens is decoded each time, and what it adds
to what was emitted before is new. `Detokenizer` does that, `StopChecker` looks for stop strings across the pieces,
`OutputText` is both: the text of one request.

A window whose first tokens are there for the spacing only is the method of TGI and vLLM (`detokenize_incrementally`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for bytes that are not a whole character
_WINDOW = 16  # tokens, after which the window is cut; long enough to make cutting rare, short enough to decode fast


class Decoder(Protocol):
    """A `tokenizers.Tokenizer`, or one of transformers' tokenizers."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""


class Detokenizer:
    """Incremental decoding of one sequence. Each token is decoded a bounded number of times.

    The pieces of `append` and `flush` joined are the decode of all tokens. (One exception: in vocabularies with byte
    fallback, a decoder replaces a whole run of byte tokens when its end is not UTF-8; characters of the run that were
    complete have been emitted by then and stay.)

    Args:
        tokenizer: decodes token ids.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: what the sequence continues, so that the space before its first word is right. Their text is
            not emitted. Without them, the pieces are the decode of the output on its own.
    """

    def __init__(
        self, tokenizer: Decoder, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = self._last_words(prompt_token_ids)
        self._text = self._decode(self._window)  # of the window
        self._emitted = len(self._text) - _unfinished(self._text)  # characters of it
        self._boundary = 0  # tokens of the window at the last but one time that its text ended in a whole character

    def append(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; returns the text that they complete, often "" in the middle of a character."""
        if not token_ids:
            return ""
        self._window.extend(token_ids)
        before, self._text = self._text, self._decode(self._window)
        unfinished = _unfinished(self._text)
        piece = self._emit(len(self._text) - unfinished)
        if unfinished:
            if len(self._window) > 4 * _WINDOW:
                piece += self._cut_anywhere()
        elif self._text == before and (before or len(self._window) > _WINDOW):
            del self._window[-len(token_ids) :]  # tokens without text, such as special ones, need no place in it
        else:
            if len(self._window) > _WINDOW:
                self._cut(self._boundary)
            self._boundary = len(self._window)
        return piece

    def flush(self) -> str:
        """The rest, when no more tokens come: characters whose end never came, as U+FFFD."""
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        start, self._emitted = self._emitted, max(self._emitted, end)
        return self._text[start:end]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens) if token_ids else ""

    def _cut(self, start: int) -> None:
        """Drop the tokens before `start` if the others have text of their own: it tells the spacing of what follows."""
        rest = self._window[start:]
        text = self._decode(rest)
        if text:
            self._window, self._text, self._emitted = rest, text, len(text)

    def _cut_anywhere(self) -> str:
        """Cut a window of bytes that don't become characters, where no character spans the cut; returns the text."""
        for start in range(len(self._window) - 1, 0, -1):
            left, right = self._decode(self._window[:start]), self._decode(self._window[start:])
            if right and left + right == self._text:
                piece = left[self._emitted :]
                self._window, self._text, self._emitted, self._boundary = self._window[start:], right, 0, 0
                return piece
        return ""

    def _last_words(self, token_ids: Sequence[int]) -> list[int]:
        """The shortest end of the prompt that has text and begins with a whole character, if there is one."""
        for length in range(1, min(len(token_ids), _WINDOW) + 1):
            tail = list(token_ids[-length:])
            text = self._decode(tail)
            if text and not text.startswith(_UNFINISHED):
                return tail
        return list(token_ids[-_WINDOW:])


def _unfinished(text: str) -> int:
    """How many characters at the end may change with the next token: with byte fallback, each byte shows as one."""
    return len(text) - len(text.rstrip(_UNFINISHED))


class StopChecker:
    """Finds the first stop string in text that comes in pieces, and holds back no more than could be its beginning.

    What is emitted does not depend on how the text is cut into pieces: of several stop strings the one that is complete
    first counts, of those that end together the one that begins first.

    Args:
        stop: the strings; none means that all text passes.
        include: emit the stop string too.

    Attributes:
        stopped_by: the stop string that was found.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._open = ""  # end of the text so far that could begin a stop string; already emitted if `include`
        self.stopped_by: str | None = None

    def append(self, text: str) -> str:
        """Take the next piece; returns what can be shown. After a stop string, nothing can."""
        if self.stopped_by is not None or not text:
            return ""
        emitted = len(self._open) if self._include else 0
        text = self._open + text
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, start, self.stopped_by = min(found)
            self._open = ""
            return text[emitted : end if self._include else start]
        size = self._open_end(text)
        self._open = text[len(text) - size :]
        return text[emitted : len(text) if self._include else len(text) - size]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._open = "" if self._include else self._open, ""
        return held

    def _open_end(self, text: str) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class OutputText:
    """The text of one output as it grows.

    Args:
        detokenizer: new, for this output.
        stop: stop strings.
        include_stop: keep the stop string.
        min_tokens: stop strings do not count in the text of this many first tokens.

    Attributes:
        text: all that was emitted; final after `finish` or once `stopped_by` is set.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._checker = StopChecker(stop, include_stop)
        self._unchecked_tokens = min_tokens
        self.text = ""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text, if one did: the request is to finish."""
        return self._checker.stopped_by

    def append(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; returns the new text. A stop token whose text is not wanted must not be among them."""
        free = token_ids[: self._unchecked_tokens]
        self._unchecked_tokens -= len(free)
        piece = self._detokenizer.append(free) if free else ""
        piece += self._checker.append(self._detokenizer.append(token_ids[len(free) :]))
        self.text += piece
        return piece

    def finish(self) -> str:
        """No more tokens come; returns the rest of the text, which may still hold a stop string."""
        piece = self._checker.append(self._detokenizer.flush()) + self._checker.flush()
        self.text += piece
        return piece
