"""One of the n continuations of a prompt: from the engine's deltas to pieces of text, until it ends."""

from __future__ import annotations

from dataclasses import dataclass

from phase0_prototype.detokenizer import Detokenizer, OutputText
from phase0_prototype.outputs import CompletionOutput, PositionLogprobs, position_logprobs
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tokenizer import Tokenizer
from phase4_scheduler.core.wire import Delta, Ranked


@dataclass(slots=True)
class Piece:
    """What is new of one sequence.

    Attributes:
        index: 0 .. n-1.
        text: whole characters; often "" while a character or a possible stop string is incomplete.
        token_ids: new tokens, those of a stop string or the end token too.
        logprobs: one for each of them; None unless asked for.
        finish_reason: in the last piece of a sequence: "stop", "length", "abort" or "error".
        stop_reason: the stop string or stop token id; for "abort" and "error" why.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def extend(self, later: Piece) -> None:
        """Append what came next of the same sequence."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class OutputSequence:
    """All of one sequence so far.

    Args:
        index: 0 .. n-1.
        prompt_token_ids: what it continues.
        params: of the request.
        tokenizer: None leaves the text empty.

    Attributes:
        finish_reason: None while it runs.
    """

    def __init__(
        self, index: int, prompt_token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self._index, self._params, self._tokenizer = index, params, tokenizer
        self._text: OutputText | None = None
        if tokenizer is not None:
            detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, prompt_token_ids)
            self._text = OutputText(detokenizer, params.stop, params.include_stop_str_in_output, params.min_tokens)
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._cumulative = 0.0
        self.finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    def take(self, delta: Delta) -> Piece:
        """New tokens, and the end if the engine says so; a stop string in the text is an end, too."""
        new, reason, text = delta.token_ids, delta.finish_reason, self._text
        piece = Piece(self._index, "", new)
        self._token_ids += new
        if delta.logprobs is not None:
            piece.logprobs = [named(one, self._tokenizer) for one in delta.logprobs]
            self._logprobs += piece.logprobs
            for one in delta.logprobs:
                self._cumulative += one.logprob
        if text is not None and new:
            hides_last = reason == "stop" and not self._params.include_stop_str_in_output
            piece.text = text.append(new[:-1] if hides_last else new)
        if reason is not None:
            self._finish(piece, reason, delta.stop_reason)
        elif text is not None and text.stopped_by is not None:
            self._finish(piece, "stop", text.stopped_by)
        return piece

    def abort(self, reason: str | None) -> Piece:
        """End it here; returns the rest of its text."""
        piece = Piece(self._index, "", [])
        self._finish(piece, "abort", reason)
        return piece

    def so_far(self) -> CompletionOutput:
        """Everything until now."""
        asked = self._params.logprobs is not None
        return CompletionOutput(
            self._index,
            self._text.text if self._text else "",
            list(self._token_ids),
            self._cumulative if asked else None,
            list(self._logprobs) if asked else None,
            self.finish_reason,
            self._stop_reason,
        )

    def _finish(self, piece: Piece, reason: str, stop_reason: int | str | None) -> None:
        """The characters that were held back may still complete a stop string."""
        if self._text is not None:
            piece.text += self._text.finish()
            if self._text.stopped_by is not None:
                reason, stop_reason = "stop", self._text.stopped_by
        piece.finish_reason = self.finish_reason = reason
        piece.stop_reason = self._stop_reason = stop_reason


def named(ranked: Ranked, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """Log-probabilities at a position with the text of each token."""

    def decode(token_id: int) -> str:
        return tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else ""

    return position_logprobs(ranked.token_id, ranked.logprob, ranked.rank, ranked.top_ids, ranked.top_logprobs, decode)
