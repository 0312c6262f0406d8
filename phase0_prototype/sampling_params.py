"""What a user may ask of sampling, in vLLM's names and defaults, checked when it is written down.

    SamplingParams(temperature=0.8, top_p=0.95, stop=["\\n\\n"])
    SamplingParams.from_dict({"temperature": 0.8})          # the same, from JSON or a command line

Both refuse what they don't know with one `ParameterError` that names the field, the value and what is allowed. The
limits are part of each field's declaration below, so there is one place to read, change and check them.

Names, defaults and limits follow vLLM's `vllm/sampling_params.py`, with two differences: `max_tokens=None` means "to
the end of the context", and nothing is clamped or ignored silently. This file imports no torch: commands use it.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, Self

from phase0_prototype.errors import UserError

GREEDY_BELOW = 1e-5  # a lower temperature would overflow the division of the logits; vLLM draws the line here too


class ParameterError(UserError):
    """A sampling parameter that is unknown or has a bad value. `field` is its name, for programs that report it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class _Check(Protocol):
    """Turn a user's value into what is kept, or raise `ParameterError`."""

    def __call__(self, name: str, value: object) -> object: ...


def _bad(name: str, value: object, allowed: str) -> ParameterError:
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return ParameterError(name, f"{name}={shown} ({type(value).__name__}) is not allowed: give {allowed}")


def _declare(default: object, check: _Check) -> Any:
    return field(default=default, metadata={"check": check})


def _number(default: float, allowed: str, low: float, high: float, *, above_low: bool = False) -> Any:
    """A float in [low, high], or in (low, high]."""

    def check(name: str, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise _bad(name, value, allowed)
        number = float(value)
        if not low <= number <= high or (above_low and number == low):  # true of NaN, too
            raise _bad(name, value, allowed)
        return number

    return _declare(default, check)


def _integer(default: int | None, allowed: str, low: int, high: float = math.inf) -> Any:
    """An int in [low, high]; None too when that is the default or `allowed` says so."""
    none_is_allowed = default is None or "None" in allowed

    def check(name: str, value: object) -> object:
        if value is None and none_is_allowed:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            raise _bad(name, value, allowed)
        return int(value)

    return _declare(default, check)


def _flag(default: bool) -> Any:
    def check(name: str, value: object) -> object:
        if not isinstance(value, bool):
            raise _bad(name, value, "True or False")
        return value

    return _declare(default, check)


def _strings(name: str, value: object) -> object:
    allowed = "a non-empty string or a list of them"
    given = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, str) and one for one in given):
        raise _bad(name, value, allowed)
    return tuple(dict.fromkeys(given))


def _token_ids(name: str, value: object) -> object:
    allowed = "a list of token ids (integers from 0)"
    given = [] if value is None else value
    if not isinstance(given, (list, tuple, set, frozenset)):
        raise _bad(name, value, allowed)
    if not all(isinstance(one, Integral) and not isinstance(one, bool) and int(one) >= 0 for one in given):
        raise _bad(name, value, allowed)
    return tuple(dict.fromkeys(int(one) for one in given))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Raises `ParameterError`.

    Attributes:
        n: outputs for each prompt. Each has random choices of its own.
        temperature: logits are divided by it; 0 (or less than 1e-5) takes the most likely token.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the fewest tokens whose probabilities reach this sum (nucleus sampling, arXiv:1904.09751).
        min_p: keep tokens at least this times as likely as the most likely one (arXiv:2407.01082).
        repetition_penalty: logits of tokens of prompt and output are divided by it (multiplied where negative).
        presence_penalty: subtracted from the logit of each token that the output holds already.
        frequency_penalty: subtracted once for each time that the output holds the token.
        stop: the output ends before any of these strings. Kept as a tuple.
        stop_token_ids: the output ends at any of these tokens. Kept as a tuple.
        include_stop_str_in_output: keep the stop string, or the text of the stop token, in the text.
        ignore_eos: go on after the model's own end token.
        max_tokens: tokens to generate at most; None is "as many as the context holds".
        min_tokens: end tokens and stop strings have no effect before this many tokens.
        seed: the same seed gives the same output whatever else runs; None takes one from the engine's.
        logprobs: log-probabilities of this many most likely tokens with each token; -1 is all, None is off.
        prompt_logprobs: the same for the tokens of the prompt.
        skip_special_tokens: leave special tokens out of the text.
    """

    __signature__: ClassVar[inspect.Signature]

    n: int = _integer(1, "an integer from 1 to 16384", 1, 16384)
    temperature: float = _number(1.0, "a number from 0 to 2", 0.0, 2.0)
    top_k: int = _integer(0, "a positive integer, or 0 or -1 for all tokens", -1)
    top_p: float = _number(1.0, "a number greater than 0 and at most 1", 0.0, 1.0, above_low=True)
    min_p: float = _number(0.0, "a number from 0 to 1", 0.0, 1.0)
    repetition_penalty: float = _number(1.0, "a number greater than 0 and at most 100", 0.0, 100.0, above_low=True)
    presence_penalty: float = _number(0.0, "a number from -2 to 2", -2.0, 2.0)
    frequency_penalty: float = _number(0.0, "a number from -2 to 2", -2.0, 2.0)
    stop: Sequence[str] = _declare((), _strings)
    stop_token_ids: Sequence[int] = _declare((), _token_ids)
    include_stop_str_in_output: bool = _flag(False)
    ignore_eos: bool = _flag(False)
    max_tokens: int | None = _integer(16, "a positive integer, or None for the rest of the context", 1)
    min_tokens: int = _integer(0, "an integer from 0", 0)
    seed: int | None = _integer(None, "an integer from 0 to 2**63 - 1, or None", 0, 2**63 - 1)
    logprobs: int | None = _integer(None, "an integer from 0, -1 for all tokens, or None", -1)
    prompt_logprobs: int | None = _integer(None, "an integer from 0, -1 for all tokens, or None", -1)
    skip_special_tokens: bool = _flag(True)

    def __new__(cls, *args: object, **given: object) -> Self:
        """Name unknown fields before the generated `__init__` answers them with a `TypeError`."""
        if args:
            raise ParameterError("", "sampling parameters are given by name: SamplingParams(temperature=0.8)")
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise ParameterError(name, f"{name} is not a sampling parameter: {remedy}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for one in fields(self):
            checked = one.metadata["check"](one.name, getattr(self, one.name))
            object.__setattr__(self, one.name, checked)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        if self.greedy and self.n > 1:
            raise _bad("n", self.n, "1 with temperature=0 (all outputs would be equal), or a temperature above 0")

    @cached_property  # asked for each sequence in each step
    def greedy(self) -> bool:
        """Whether the most likely token is taken, with no randomness."""
        return self.temperature < GREEDY_BELOW

    @cached_property
    def plain(self) -> bool:
        """Whether the largest of the model's own logits decides, and nothing but the token is wanted."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return self.greedy and not penalties and not self.min_tokens and self.logprobs is None

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Read parameters from JSON-like data: the same checks and errors as the constructor."""
        if not isinstance(given, Mapping):
            raise ParameterError("", f"sampling parameters must be a mapping of names to values, not {given!r:.60}")
        return cls(**{str(name): value for name, value in given.items()})


# `__new__` hides the generated signature from help(), Jupyter and inspect; this shows it again, without `self`.
_signature = inspect.signature(SamplingParams.__init__)
SamplingParams.__signature__ = _signature.replace(parameters=[*_signature.parameters.values()][1:])
