"""From what a client sent to token ids. Text of a message never becomes a special token.

A checkpoint's tokenizer turns the text `<|im_end|>` into the token that ends a message, wherever it stands. In a raw
completion that is what the caller wants: the prompt is theirs. In a chat it would let a user's text end their message
and begin one as the system. So inside messages such text is cut after its first character, and the pieces are encoded
apart: the model reads the same characters as ordinary tokens. (transformers and vLLM encode it as the special token.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tokenizer import Tokenizer
from phase4_scheduler.core.wire import Info
from phase4_scheduler.server.chat_template import ChatTemplate
from phase4_scheduler.server.errors import ApiError, bad

_LONG = 50_000  # characters whose encoding takes so long that it is done beside the event loop


class TextEncoder(Tokenizer):
    """The tokenizer of the model, with what a server asks of it beside encoding a prompt.

    Args:
        tokenizer: the model's; nothing is loaded again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._rust = tokenizer._rust
        self.special = frozenset(t.content for t in self._rust.get_added_tokens_decoder().values() if t.special)
        self._longest = max(map(len, self._rust.get_vocab(with_added_tokens=True)), default=1)

    def ids(self, pieces: Iterable[str], add_special_tokens: bool = True) -> list[int]:
        """Token ids of texts that are encoded apart, without tokens around each when there are several."""
        texts = list(pieces)
        if len(texts) == 1:
            return self._rust.encode(texts[0], add_special_tokens=add_special_tokens).ids
        return [i for text in texts for i in self._rust.encode(text, add_special_tokens=False).ids]

    async def encode_pieces(self, pieces: Sequence[str], room: int, add_special_tokens: bool = True) -> list[int]:
        """Like `ids`, for text of any length.

        Args:
            pieces: the text.
            room: tokens that fit; text that can't fit is refused before it costs anything.
            add_special_tokens: put the tokenizer's own around it.

        Raises:
            ApiError: 400; it is too long.
        """
        size = sum(map(len, pieces))
        if size > room * self._longest:
            raise bad(f"the prompt has {size} characters, more than {room} tokens can hold: shorten it")
        if size < _LONG:
            return self.ids(pieces, add_special_tokens)
        return await asyncio.to_thread(self.ids, pieces, add_special_tokens)

    def text(self, token_id: int) -> str:
        """The text of one token; special ones too."""
        return self.decode([token_id], skip_special_tokens=False)

    def cut_special(self, text: str, mark: str) -> str:
        """The text with a mark inside everything that would be encoded as a special token."""
        found = True
        while found:
            found = False
            for special in self.special:
                if len(special) > 1 and special in text:
                    text, found = text.replace(special, special[0] + mark + special[1:]), True
        return text


def chat_pieces(
    template: ChatTemplate,
    encoder: TextEncoder,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """The prompt of a chat, in pieces that are encoded apart. Joined, they are the template's text.

    Raises:
        TemplateError: one line.
    """
    mark = _absent(messages)
    cut = [{name: encoder.cut_special(text, mark) for name, text in message.items()} for message in messages]
    text = template.render(
        cut,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        variables=variables,
    )
    return text.split(mark)


def _absent(messages: Sequence[Mapping[str, str]]) -> str:
    """A character that no message holds: Unicode reserves some that are never text."""
    used = {c for message in messages for text in message.values() for c in text if "\ufdd0" <= c <= "\ufdef"}
    free = [chr(c) for c in range(0xFDD2, 0xFDF0) if chr(c) not in used]
    if not free:
        raise bad("messages hold all of Unicode's noncharacters U+FDD2..U+FDEF: leave one out", "messages")
    return free[0]


def truncated(ids: list[int], truncate: int | None, longest: int) -> list[int]:
    """The last `truncate` tokens; -1: as many as the model takes.

    Raises:
        ApiError: 400; a number that means nothing.
    """
    if truncate is None:
        return ids
    if truncate != -1 and not 1 <= truncate <= longest:
        raise bad(
            f"truncate_prompt_tokens={truncate} is not allowed: give 1 to {longest}, or -1", "truncate_prompt_tokens"
        )
    return ids[-(longest - 1 if truncate == -1 else truncate) :]


def check_room(ids: list[int], params: SamplingParams, info: Info) -> None:
    """Raises ApiError 400 unless a prompt is of the vocabulary and its answer fits into the context."""
    unknown = next((i for i in ids if not 0 <= i < info.vocab_size), None)
    if unknown is not None:
        raise bad(f"token id {unknown:.3g} is not of the vocabulary 0..{info.vocab_size - 1}", "prompt")
    asked = params.max_tokens
    if len(ids) >= info.max_model_len or (asked is not None and len(ids) + asked > info.max_model_len):
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens and the answer may have {asked or 'at least 1'}, together more than the "
            f"model's {info.max_model_len}: shorten the prompt or lower max_tokens",
            param="prompt" if len(ids) >= info.max_model_len else "max_tokens",
            code="context_length_exceeded",
        )
