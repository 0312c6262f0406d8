"""What a storm is made of: requests of many kinds, and what their clients do to them. Plain data from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from phase4_scheduler.bench.client import CHAT, COMPLETIONS

How = Literal["FIN", "RST", "half-close"]
HOWS: tuple[How, ...] = ("FIN", "RST", "half-close")
WORDS = ("def", "return", "value", "yield", "self.rows", "import os", "x = 1", "naïve", "你好", "👋")
LEAVING, LATE, STOPPING, SEVERAL = 0.3, 0.1, 0.1, 0.2  # shares of the requests


@dataclass(frozen=True)
class Leave:
    """A client that goes away.

    Attributes:
        how: it closes, resets, or closes its half only and waits.
        events: after so many events of a stream,
        seconds: or so long after it has sent, whichever comes first.
    """

    how: How
    events: int
    seconds: float


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        number: from 0.
        path: /v1/completions or /v1/chat/completions.
        fields: of its body.
        subject: what it continues, for an oracle.
        leave: None: the client stays to the end.
    """

    number: int
    path: str
    fields: dict[str, Any]
    subject: int
    leave: Leave | None = None

    @property
    def n(self) -> int:
        """Sequences that it asks for."""
        return int(self.fields.get("n", 1))

    @property
    def is_undisturbed(self) -> bool:
        """Whether nothing but the server can keep it from all of its answer."""
        return self.leave is None and "timeout" not in self.fields

    def encode(self, host: str) -> bytes:
        """The request as it is sent."""
        body = msgspec.json.encode(self.fields)
        head = f"POST {self.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def asks(
    count: int,
    seed: int,
    *,
    prompts: Sequence[str] | None = None,
    shortest: int = 1,
    longest: int = 60,
    stops: Sequence[str] = (),
    calm: bool = False,
) -> list[Ask]:
    """So many requests.

    Args:
        count: how many.
        seed: of everything that is random about them.
        prompts: to continue greedily; None: any words, each request with a seed of its own.
        shortest, longest: tokens of an answer.
        stops: stop strings that some ask for.
        calm: no client leaves and no time-out passes.
    """
    rng = random.Random(seed)
    made = []
    for number in range(count):
        fields: dict[str, Any] = {
            "max_tokens": rng.randint(shortest, longest),
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if prompts is None:
            subject = rng.randrange(1 << 40)
            fields["seed"] = subject
            text = " ".join(rng.choices(WORDS, k=rng.choice((2, 20, 200))))
        else:
            subject = rng.randrange(len(prompts))
            fields["temperature"] = 0
            text = prompts[subject]
        is_chat = rng.random() < 0.4
        if is_chat:
            fields["messages"] = [{"role": "user", "content": text}]
        else:
            fields["prompt"] = text
        fields["stream"] = rng.random() < 0.7
        if rng.random() < SEVERAL:
            fields["n"] = rng.randint(2, 3)
            if prompts is not None:  # several greedy answers are refused; the most likely of one token is the same
                fields |= {"temperature": 1.0, "top_k": 1}
        if stops and rng.random() < STOPPING:
            fields["stop"] = [rng.choice(stops)]
        leave = None
        if rng.random() < LEAVING and not calm:
            leave = Leave(rng.choice(HOWS), rng.randrange(12), rng.choice((0.0, 0.02, 0.1, 0.3)))
        elif rng.random() < LATE and not calm:
            fields["timeout"] = rng.uniform(0.02, 0.5)
        made.append(Ask(number, CHAT if is_chat else COMPLETIONS, fields, subject, leave))
    return made
