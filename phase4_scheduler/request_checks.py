"""What a client makes of a user's request before an engine hears of it: checked tokens, and no more than was asked."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tokenizer import Tokenizer
from phase4_scheduler.core.wire import Info

_DEFAULTS = tuple((f.name, f.default) for f in fields(SamplingParams))


def encode(prompt: str | list[int], tokenizer: Tokenizer | None, info: Info) -> list[int]:
    """Token ids of a prompt, as `phase0_prototype.engine.Engine.add_request` takes them.

    Raises:
        UserError: it is empty, too long, holds unknown ids, or is text and there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("this checkpoint has no tokenizer.json: give the prompt as token ids")
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
    if not ids:
        raise UserError("the prompt is empty: give at least one token")
    unknown = next((i for i in ids if type(i) is not int or not 0 <= i < info.vocab_size), None)
    if unknown is not None:
        raise UserError(f"token id {unknown!r} is not an integer of the vocabulary 0..{info.vocab_size - 1}")
    if len(ids) >= info.max_model_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens, max_model_len is {info.max_model_len} and one must be left "
            "for the answer: shorten the prompt or raise max_model_len"
        )
    return ids


def differing(params: SamplingParams) -> dict[str, Any]:
    """What is not the default, as `SamplingParams.from_dict` takes it."""
    return {name: value for name, default in _DEFAULTS if (value := getattr(params, name)) != default}


def check_urgency(priority: object, timeout: object) -> None:
    """Raises UserError where `priority` is no integer of 32 bits, or `timeout` no number of seconds."""
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise UserError(f"priority={priority!r} is not allowed: give an integer of 32 bits, smaller is more urgent")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise UserError(f"timeout={timeout!r} is not allowed: give seconds above 0, or None")
