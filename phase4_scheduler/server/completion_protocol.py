"""POST /v1/completions: the request. https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core.wire import Info
from phase4_scheduler.server.errors import bad
from phase4_scheduler.server.fields import Generating, Int64, sampling_params
from phase4_scheduler.server.options import ServerOptions


class CompletionRequest(Generating, kw_only=True, forbid_unknown_fields=True):
    """A request for continuations of one or more prompts.

    Attributes:
        prompt: a text, texts, token ids, or lists of token ids.
        logprobs: how many of the most likely tokens come with each token.
        echo: the prompt comes before the continuation, with its log-probabilities if `logprobs` is set.
    """

    prompt: str | list[str | int | list[int]]
    logprobs: Int64 | None = None
    echo: bool | None = None


def prompts_of(request: CompletionRequest, most: int) -> list[str | list[int]]:
    """The prompts, each a text or token ids.

    Raises:
        ApiError: 400; none, too many, or kinds that are mixed.
    """
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise bad("prompt is an empty list: give at least one prompt", "prompt")
    if all(isinstance(one, int) for one in given):
        return [given]  # type: ignore[list-item]  # all are integers
    if any(isinstance(one, int) for one in given) or len({type(one) for one in given}) != 1:
        raise bad("prompt mixes kinds: give a text, texts, token ids, or lists of token ids", "prompt")
    if len(given) > most:
        raise bad(f"prompt holds {len(given)} prompts: give at most {most}", "prompt")
    return given  # type: ignore[return-value]


def completion_params(request: CompletionRequest, options: ServerOptions, info: Info) -> SamplingParams:
    """The engine's parameters. `max_tokens=0` with `echo` asks about the prompt only: one token is made and not shown.

    Raises:
        ApiError: 400 that names the field.
    """
    more: dict[str, Any] = {"logprobs": request.logprobs}
    if request.max_tokens is not None:
        more["max_tokens"] = request.max_tokens
    if shows_prompt_only(request):
        more["max_tokens"] = 1
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        params = sampling_params(request, options, info, **more)
        return replace(params, prompt_logprobs=request.logprobs)
    return sampling_params(request, options, info, **more)


def shows_prompt_only(request: CompletionRequest) -> bool:
    """Whether the request wants the prompt back and nothing more."""
    return bool(request.echo) and request.max_tokens == 0


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a text, or messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize: token ids."""

    tokens: list[int]
    model: str | None = None
