"""What each request of a storm must be answered, known without the server; and all that is wrong with an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phase0_prototype.seeds import derive_seed
from phase0_prototype.tokenizer import load_tokenizer
from phase4_scheduler.measures.chaos_client import Outcome, Told
from phase4_scheduler.measures.chaos_plan import Ask
from phase4_scheduler.null_engine import TEXT, TOKENIZER

BROKEN = "\ufffd"  # what stands for a character whose tokens are not all there
Expected = Callable[[Ask, int], "Alone"]


@dataclass(frozen=True)
class Alone:
    """A sequence of a request that nobody disturbs.

    Attributes:
        token_ids: as many as it may have, without regard to stop strings.
        text: theirs.
    """

    token_ids: list[int]
    text: str


def of_null() -> Expected:
    """The engine without a model repeats a text, each sequence from the place that its seed says."""
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)

    def expected(ask: Ask, index: int) -> Alone:
        start = derive_seed(ask.subject, index) if index else ask.subject
        tokens = [ids[(start + i) % len(ids)] for i in range(ask.fields["max_tokens"])]
        return Alone(tokens, tokenizer.decode(tokens))

    return expected


def of_answers(answers: Sequence[Sequence[int]], decode: Callable[[list[int]], str]) -> Expected:
    """Greedy answers, by subject, that were computed alone and as long as the longest that is asked for."""

    def expected(ask: Ask, index: int) -> Alone:
        tokens = list(answers[ask.subject][: ask.fields["max_tokens"]])
        return Alone(tokens, decode(tokens))

    return expected


def faults(ask: Ask, outcome: Outcome, expected: Expected) -> list[str]:
    """Everything that is wrong with what a client was told; for one that left, with what it had been told by then."""
    found = [*_of_the_answer(ask, outcome)]
    for index, told in outcome.sequences.items():
        if not 0 <= index < ask.n:
            found.append(f"a sequence {index} of {ask.n}")
            continue
        found += [f"sequence {index}: {fault}" for fault in _of_a_sequence(ask, told, expected(ask, index))]
    return [f"request {ask.number}: {fault}" for fault in found]


def _of_the_answer(ask: Ask, outcome: Outcome) -> list[str]:
    """Status, errors and ends."""
    found = []
    if outcome.status >= 500 and outcome.status != 503:
        found.append(f"status {outcome.status}: {outcome.errors}")
    if outcome.is_refused and "retry-after" not in outcome.headers:
        found.append(f"{outcome.status} without Retry-After: {outcome.errors}")
    if len(outcome.errors) > 1:
        found.append(f"{len(outcome.errors)} errors: {outcome.errors}")
    if outcome.is_late:
        found.append("something came after [DONE]")
    if ask.leave is not None:
        return found
    if outcome.broken:
        found.append(f"its connection broke: {outcome.broken}")
    elif not outcome.is_complete:
        found.append("its answer has no end")
    if not ask.is_undisturbed:
        ok = outcome.status == 408 or (outcome.status == 200 and not outcome.errors)
        return found if ok or outcome.is_refused else [*found, f"status {outcome.status}: {outcome.errors}"]
    if outcome.status != 200 or outcome.errors:
        return [*found, f"status {outcome.status} after {outcome.attempts} attempts: {outcome.errors}"]
    if sorted(outcome.sequences) != list(range(ask.n)):
        found.append(f"sequences {sorted(outcome.sequences)} of {ask.n}")
    found += [f"sequence {i} has {len(s.ends)} ends" for i, s in outcome.sequences.items() if len(s.ends) != 1]
    return found


def _of_a_sequence(ask: Ask, told: Told, alone: Alone) -> list[str]:
    """Its tokens and its text are the beginning of what it says alone; all of it where it says that it is whole."""
    found = []
    if len(told.ends) > 1 or told.is_late:
        found.append(f"something came after its end: {told.ends}")
    if told.token_ids is not None and told.token_ids != alone.token_ids[: len(told.token_ids)]:
        found.append(f"tokens {told.token_ids} are not those of {alone.token_ids}")
    text, whole = told.text.strip(BROKEN), alone.text.strip(BROKEN)
    if not whole.startswith(text):
        found.append(f"text {text!r} is not that of {whole!r}")
    reason, stop = told.ends[0] if told.ends else ("", None)
    stops = ask.fields.get("stop", [])
    if any(one in text for one in stops):
        found.append(f"a stop string of {stops} is in {text!r}")
    if reason == "length" and (text != whole or (told.token_ids is not None and told.token_ids != alone.token_ids)):
        found.append(f"it ended by its length, too early: {text!r} of {whole!r}")
    if reason == "stop" and (stop not in stops or not whole.startswith(text + str(stop))):
        found.append(f"it stopped at {stop!r} after {text!r} of {whole!r}")
    if reason == "abort" and ask.is_undisturbed:
        found.append(f"it was aborted: {stop}")
    if reason not in ("", "length", "stop", "abort"):
        found.append(f"it ended with {reason!r}")
    return found
