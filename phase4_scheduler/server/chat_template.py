"""Chat templates: Jinja programs of the checkpoint, run in a sandbox, with transformers' rules and helpers.

They come with the model (`chat_template.jinja`, or in `tokenizer_config.json`) or from the operator, never from a
client. See `transformers/utils/chat_template_utils.py` for what templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phase0_prototype.errors import UserError

_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", *_TOKENS)


class TemplateError(UserError):
    """The template refuses these messages, or can't be run with them."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training: here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012  # the name and type that jinja2 asks for

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The tag's body in its place."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One template.

    Args:
        source: Jinja.
        variables: special tokens by name, as `bos_token`.
        name: where it comes from, for errors.

    Raises:
        UserError: it is not Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], name: str = "chat template") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name} is not a Jinja template: line {error.lineno}: {error.message}") from None
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat.

        Args:
            messages: role and content of each.
            add_generation_prompt: end with what begins an assistant's message.
            continue_final_message: end with the last message's content, open.
            variables: more of the template's.

        Raises:
            TemplateError: one line.
        """
        if add_generation_prompt and continue_final_message:
            raise TemplateError(
                "add_generation_prompt and continue_final_message exclude each other: set add_generation_prompt to "
                "false to continue the last message"
            )
        for name in variables or {}:
            if name in _RESERVED or name.startswith("_"):
                raise TemplateError(f"chat_template_kwargs holds {name!r:.60}, which the server sets: leave it out")
        given = [dict(message) for message in messages]
        end = ""
        if continue_final_message:
            end = _absent(given)
            given[-1]["content"] += end + " "  # the space tells whether the template trims
        try:
            text = self._template.render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
                **(variables or {}),
            )
        except TemplateError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise TemplateError(
                f"the chat template refuses these messages: {str(error).splitlines()[0]:.200}"
            ) from None
        if continue_final_message:
            if end not in text:
                raise TemplateError("the chat template leaves the last message out: it can't be continued")
            before, _, after = text.rpartition(end)
            text = before if after.startswith(" ") else before.rstrip()
        return text


def _absent(messages: Sequence[Mapping[str, Any]]) -> str:
    """A mark that no message holds, so that it can be found again."""
    text = "".join(m["content"] for m in messages)
    return next(mark for i in range(len(text) + 1) if (mark := f"\ufdd1{i}\ufdd1") not in text)


def _raise(message: str) -> NoReturn:
    raise TemplateError(f"the chat template refuses these messages: {str(message)[:200]}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def load_chat_template(directory: Path, override: Path | None = None) -> ChatTemplate | None:
    """The template of a checkpoint, or of a file; None if there is none.

    Raises:
        UserError: a file that can't be read, or that is no template.
    """
    config = _config(directory / "tokenizer_config.json")
    tokens = {name: found for name in _TOKENS if (found := _token(config.get(name)))}
    file = override or directory / "chat_template.jinja"
    if override is not None or file.is_file():
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} can't be read as a chat template: {error}") from None
        return ChatTemplate(source, tokens, str(file))
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return ChatTemplate(found, tokens, str(directory / "tokenizer_config.json")) if isinstance(found, str) else None


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _token(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None
