"""POST /v1/chat/completions: the request. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core.wire import Info
from phase4_scheduler.server.errors import bad
from phase4_scheduler.server.fields import Generating, Int64, sampling_params
from phase4_scheduler.server.options import ServerOptions

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What answers carry and clients send back, as long as it says nothing.
_EMPTY_FIELDS = ("tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning", "reasoning_content")


class ChatRequest(Generating, kw_only=True, forbid_unknown_fields=True):
    """A request for the next message of a chat.

    Attributes:
        messages: role and content of each; content is a text or a list of parts of type "text".
        max_completion_tokens: OpenAI's new name of `max_tokens`.
        logprobs, top_logprobs: whether, and how many of the most likely tokens come with each token.
        add_generation_prompt: end the prompt with what begins an assistant's message (the default).
        continue_final_message: the answer goes on with the last message instead of beginning another.
        chat_template_kwargs: more variables of the template, plain values only.
    """

    messages: list[dict[str, Any]]
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None


def chat_params(request: ChatRequest, options: ServerOptions, info: Info) -> SamplingParams:
    """The engine's parameters; without a limit the answer may fill the context.

    Raises:
        ApiError: 400 that names the field.
    """
    most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("top_logprobs say nothing without logprobs: set logprobs to true", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return sampling_params(request, options, info, max_tokens=most, logprobs=logprobs)


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Messages as chat templates read them: role, content as one text, and a name if there is one.

    "developer" is the new name of "system" and most templates don't know it. Parts of a content are joined with
    newlines, as vLLM does.

    Raises:
        ApiError: 400; no message, or one that needs more than text.
    """
    if not messages:
        raise bad("messages is empty: give at least one message", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: dict[str, Any], place: str) -> dict[str, str]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad(f"{place}.role={role!r:.60} is not supported: give {', '.join(_ROLES)}", f"{place}.role")
    for name, value in message.items():
        if name in _EMPTY_FIELDS and value:
            raise bad(f"{place}.{name} is not supported by this server: leave it out", f"{place}.{name}")
        if name not in ("role", "content", "name", *_EMPTY_FIELDS):
            raise bad(f"{place}.{name:.60} is not a field of a message: leave it out", f"{place}.{name:.60}")
    plain = {"role": _ROLES[role], "content": text_of(message.get("content"), f"{place}.content")}
    own_name = message.get("name")
    if own_name is not None:
        if not isinstance(own_name, str):
            raise bad(f"{place}.name is not a text: give one or leave it out", f"{place}.name")
        plain["name"] = own_name
    return plain


def text_of(content: Any, place: str) -> str:
    """The text of a message's content.

    Raises:
        ApiError: 400; it is no text, or a part is of another type.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad(f"{place} is no text: give a text or a list of parts of type text", place)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad(f"{place}[{i}] is of type {kind!r:.60}: this server takes text only", f"{place}[{i}]")
        texts.append(part["text"])
    return "\n".join(texts)
