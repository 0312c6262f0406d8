"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's requests. https://docs.anthropic.com/en/api/messages"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.core.wire import Info
from phase4_scheduler.server.chat_protocol import text_of
from phase4_scheduler.server.errors import bad
from phase4_scheduler.server.fields import Int64, Positive, sampling_params
from phase4_scheduler.server.options import ServerOptions

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class CountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How many tokens a prompt has.

    Attributes:
        messages: role ("user" or "assistant") and content: a text, or blocks of type "text". A last message of the
            assistant is continued.
        system: a text, or blocks.
    """

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    """The next message, please. All fields but Anthropic's required three may be left out."""

    max_tokens: Positive
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Int64 | None = None


def chat_of(request: CountRequest) -> list[dict[str, str]]:
    """The messages as chat templates read them, the system's first.

    Raises:
        ApiError: 400; more than text, or a role that Anthropic does not know.
    """
    if not request.messages:
        raise bad("messages is empty: give at least one message", "messages")
    chat = []
    if request.system:
        chat.append({"role": "system", "content": _text(request.system, "system")})
    for i, message in enumerate(request.messages):
        place, role = f"messages[{i}]", message.get("role")
        if role not in ("user", "assistant"):
            raise bad(f"{place}.role={role!r:.60} is not supported: give user or assistant", f"{place}.role")
        extra = next((name for name in message if name not in ("role", "content")), None)
        if extra is not None:
            raise bad(f"{place}.{extra:.60} is not a field of a message: leave it out", place)
        chat.append({"role": role, "content": _text(message.get("content"), f"{place}.content")})
    return chat


def messages_params(request: MessagesRequest, options: ServerOptions, info: Info) -> SamplingParams:
    """The engine's parameters.

    Raises:
        ApiError: 400 that names the field.
    """
    stop = request.stop_sequences or []
    if len(stop) > options.max_stop:
        raise bad(f"stop_sequences holds {len(stop)} strings: give at most {options.max_stop}", "stop_sequences")
    return sampling_params(request, options, info, max_tokens=request.max_tokens, stop=stop)


def _text(content: Any, place: str) -> str:
    if isinstance(content, list):
        for i, block in enumerate(content):
            if isinstance(block, dict) and (block.get("citations") or set(block) - _BLOCK):
                raise bad(f"{place}[{i}] has fields beside type and text that are not supported", f"{place}[{i}]")
    return text_of(content, place)


_BLOCK = {"type", "text", "citations", "cache_control"}  # caching changes the price, never the answer
