"""Fields that clients send and this server can't honour: refused by name, unless the value asks for nothing.

A field that is silently ignored gives an answer that looks right and is not (facts: a removed `guided_json` came back
as unconstrained text with status 200). So each known field has here the values that change nothing, and all others,
like all unknown fields, are a 400.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from phase4_scheduler.server.errors import ApiError, bad


class AnyOf:
    """Values of a type that tell about the request and never change the answer."""

    def __init__(self, *types: type) -> None:
        self.types = types

    def __contains__(self, value: Any) -> bool:
        return type(value) in self.types


_NONE: tuple[Any, ...] = (None,)
_EMPTY: tuple[Any, ...] = (None, [], {}, "")
_OFF: tuple[Any, ...] = (None, False)

COMMON: Mapping[str, Any] = {
    "user": AnyOf(str, type(None)),
    "metadata": AnyOf(dict, type(None)),
    "safety_identifier": AnyOf(str, type(None)),
    "prompt_cache_key": AnyOf(str, type(None)),  # only a hint
    "prompt_cache_retention": AnyOf(str, type(None)),
    "cache_salt": AnyOf(str, type(None)),  # prompts share no memory yet, so every salt is kept apart
    "service_tier": (None, "auto", "default"),
    "store": _OFF,
    "logit_bias": _EMPTY,
    "bad_words": _EMPTY,
    "allowed_token_ids": _NONE,
    "best_of": (None, 1),
    "use_beam_search": _OFF,
    "length_penalty": (None, 1, 1.0),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": _EMPTY,
    "guided_json": _NONE,
    "guided_regex": _NONE,
    "guided_choice": _NONE,
    "guided_grammar": _NONE,
    "guided_decoding_backend": _NONE,
    "guided_whitespace_pattern": _NONE,
    "spaces_between_special_tokens": (None, True),
    "return_tokens_as_token_ids": _OFF,
    "stream_interval": _NONE,
    "logits_processors": _EMPTY,
    "kv_transfer_params": _EMPTY,
    "vllm_xargs": _EMPTY,
    "mm_processor_kwargs": _EMPTY,
    "thinking_token_budget": _NONE,
    "repetition_detection": _NONE,
}
COMPLETION: Mapping[str, Any] = {**COMMON, "suffix": (None, ""), "prompt_embeds": _NONE}
CHAT: Mapping[str, Any] = {
    **COMMON,
    "echo": _OFF,
    "tools": _EMPTY,
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),  # no tools, no calls
    "functions": _EMPTY,
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": _NONE,
    "prediction": _NONE,
    "reasoning_effort": _NONE,
    "include_reasoning": (None, True, False),
    "verbosity": _NONE,
    "web_search_options": _NONE,
    "documents": _EMPTY,
    "chat_template": _NONE,  # code that a client brings is never run
    "media_io_kwargs": _EMPTY,
}
MESSAGES: Mapping[str, Any] = {
    "metadata": AnyOf(dict, type(None)),
    "service_tier": (None, "auto", "standard_only"),
    "thinking": (None, {"type": "disabled"}),
    "tools": _EMPTY,
    "tool_choice": (None, {"type": "none"}, {"type": "auto"}),
    "container": _NONE,
    "mcp_servers": _EMPTY,
    "context_management": _NONE,
    "output_config": _EMPTY,
    "output_format": _NONE,
    "inference_geo": _NONE,
}


def strip(given: dict[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """The request without the fields that ask for nothing.

    Raises:
        ApiError: 400; a field asks for something that this server can't do.
    """
    rest: dict[str, Any] = {}
    for name, value in given.items():
        if name not in neutral:
            rest[name] = value
        elif not _among(value, neutral[name]):
            raise ApiError(
                400,
                f"{name}={_short(value)} is not supported by this server: leave {name} out",
                param=name,
                code="unsupported_parameter",
            )
    return rest


def unknown(name: str, known: Sequence[str]) -> ApiError:
    """The error for a field that nobody knows."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    remedy = f"did you mean {near[0]}?" if near else "leave it out"
    return bad(f"{name:.60} is not a field of this request: {remedy}", name)


def schema(neutral: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of these fields, for the OpenAPI document."""
    names = {str: "string", dict: "object", type(None): "null"}
    return {
        name: {"type": [names[t] for t in allowed.types]} if isinstance(allowed, AnyOf) else {"enum": list(allowed)}
        for name, allowed in neutral.items()
    }


def _among(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, AnyOf):
        return value in allowed
    return any(type(value) is type(one) and value == one for one in allowed)  # True is not 1 here


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
