"""What a load test asks: prompts, and how many tokens each answer shall have. Pure data, the same for the same seed.

    mixed          half of the answers short (10 tokens), half long (200): what static batching is worst at
    random         lengths of prompts and answers drawn evenly, as in vLLM's offline benchmark of 100 to 1,024 tokens
    fixed          all alike
    shared_prefix  groups of prompts that begin alike, as behind a system prompt
    sharegpt       lengths of real conversations: log-normal with the means that the PagedAttention paper publishes
                   for ShareGPT (arXiv 2309.06180, figure 11; phase 1's traces say how the spread was chosen)

A prompt is a list of token ids, so its length is exact with every server; or text, for chat, where a word is about a
token. Ids are drawn from the first VOCAB, which every model has, and the lowest ones are left out: they are special.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from phase0_prototype.errors import UserError

Prompt: TypeAlias = str | tuple[int, ...]
VOCAB = 1024
LOWEST_ID = 16
COMMON_NOUNS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea"
)
WORDS = tuple(COMMON_NOUNS.split())


@dataclass(frozen=True)
class WorkItem:
    """One request: its prompt, and how many tokens the answer shall have."""

    prompt: Prompt
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are sent; `name` says what they are, with the numbers."""

    name: str
    items: tuple[WorkItem, ...]

    @property
    def output_tokens(self) -> int:
        """Of all answers together."""
        return sum(item.output_tokens for item in self.items)


class PromptMaker:
    """Prompts of exact lengths in tokens, or about so many words of text.

    Args:
        seed: of the choices.
        text: words in place of token ids.
        vocab: ids are below this.
    """

    def __init__(self, seed: int, *, text: bool = False, vocab: int = VOCAB) -> None:
        self.rng = np.random.default_rng(seed)
        self._text, self._vocab = text, vocab
        if vocab <= LOWEST_ID:
            raise UserError(f"a vocabulary of {vocab} ids: give at least {LOWEST_ID + 1}")

    def make(self, length: int) -> Prompt:
        """A new prompt of this length."""
        if self._text:
            return " ".join(WORDS[i] for i in self.rng.integers(0, len(WORDS), length))
        return tuple(self.rng.integers(LOWEST_ID, self._vocab, length).tolist())


def mixed(
    count: int, maker: PromptMaker, *, short: int = 10, long: int = 200, share: float = 0.5, prompt: int = 128
) -> Workload:
    """A `share` of answers of `short` tokens, the rest of `long` ones, shuffled; all prompts of one length."""
    shorts = round(count * share)
    lengths = maker.rng.permutation([short] * shorts + [long] * (count - shorts)).tolist()
    items = tuple(WorkItem(maker.make(prompt), length) for length in lengths)
    return Workload(f"mixed: {share:.0%} answers of {short} tokens, the rest of {long}, prompts of {prompt}", items)


def random(
    count: int, maker: PromptMaker, *, prompt: tuple[int, int] = (100, 1024), output: tuple[int, int] = (100, 1024)
) -> Workload:
    """Lengths of prompts and answers drawn evenly from these ranges, both ends included."""
    for name, (low, high) in (("prompts", prompt), ("answers", output)):
        if not 1 <= low <= high:
            raise UserError(f"{name} of {low} to {high} tokens: give a range that begins at 1 or above")
    prompts = maker.rng.integers(prompt[0], prompt[1] + 1, count).tolist()
    outputs = maker.rng.integers(output[0], output[1] + 1, count).tolist()
    items = tuple(WorkItem(maker.make(p), o) for p, o in zip(prompts, outputs, strict=True))
    return Workload(
        f"random: prompts of {prompt[0]} to {prompt[1]} tokens, answers of {output[0]} to {output[1]}", items
    )


def fixed(count: int, maker: PromptMaker, *, prompt: int = 128, output: int = 128) -> Workload:
    """All prompts of one length, all answers of one length; the prompts differ."""
    items = tuple(WorkItem(maker.make(prompt), output) for _ in range(count))
    return Workload(f"fixed: prompts of {prompt} tokens, answers of {output}", items)


def shared_prefix(
    count: int, maker: PromptMaker, *, groups: int = 8, prefix: int = 256, prompt: int = 64, output: int = 64
) -> Workload:
    """`groups` prefixes; each request takes the next one in turn and adds `prompt` tokens of its own."""
    if groups < 1:
        raise UserError(f"{groups} groups of prompts: give at least 1")
    heads = [maker.make(prefix) for _ in range(groups)]
    items = tuple(WorkItem(_join(heads[i % groups], maker.make(prompt)), output) for i in range(count))
    name = f"shared prefix: {groups} of {prefix} tokens, then {prompt} of each one's own, answers of {output}"
    return Workload(name, items)


def sharegpt(count: int, maker: PromptMaker, *, longest: int | None = None) -> Workload:
    """Lengths like those of ShareGPT's conversations. With `longest` a prompt and its answer are cut to fit that."""
    from phase1_memory.traces import conversations

    jobs = conversations("sharegpt", int(maker.rng.integers(2**31)), count, 1.0).jobs
    if longest is not None and longest < 2:
        raise UserError(f"conversations of {longest} tokens: give at least 2")
    pairs = [(job.prompt, job.output) if longest is None else _cut(job.prompt, job.output, longest) for job in jobs]
    items = tuple(WorkItem(maker.make(p), o) for p, o in pairs)
    return Workload(
        "sharegpt: log-normal lengths, means 161 and 338" + (f", cut at {longest}" if longest else ""), items
    )


def _join(head: Prompt, tail: Prompt) -> Prompt:
    if isinstance(head, str) and isinstance(tail, str):
        return f"{head} {tail}"
    assert isinstance(head, tuple) and isinstance(tail, tuple)
    return head + tail


def _cut(prompt: int, output: int, longest: int) -> tuple[int, int]:
    """Both in the same proportion, each at least 1, together at most `longest`."""
    if prompt + output <= longest:
        return prompt, output
    shorter = min(longest - 1, max(1, prompt * longest // (prompt + output)))
    return shorter, longest - shorter


MAKERS: dict[str, Callable[..., Workload]] = {
    "mixed": mixed,
    "random": random,
    "fixed": fixed,
    "shared-prefix": shared_prefix,
    "sharegpt": sharegpt,
}
NAMES: Sequence[str] = tuple(MAKERS)
