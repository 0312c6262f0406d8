"""A storm: many requests whose clients leave, whose time passes, whose engine is killed; then a signal.

What must hold, whatever happens: each request that was let in ends once, and the server's own books say the same; an
answer has no token of another; who was not disturbed gets what it gets alone; and afterwards nothing runs, waits or
holds a block. `storm` and `last_wave` return everything that did not hold, in words.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from module0_profiling.bench_gpu import CheckFailed
from phase4_scheduler.measures.chaos_client import Outcome, insist, send
from phase4_scheduler.measures.chaos_oracle import Expected, faults
from phase4_scheduler.measures.chaos_plan import Ask
from phase4_scheduler.measures.chaos_server import PATIENCE, Victim, is_gone, wait

ENDS = ("stop", "length", "abort", "error")
_LAST = re.compile(r"(\d+) requests? w(?:as|ere) accepted, (\d+) stop, (\d+) length, (\d+) abort, (\d+) error")


@dataclass
class Report:
    """What a storm has shown.

    Attributes:
        faults: everything that did not hold; empty is good.
        outcomes: of the requests, in their order.
        books: what the server counted: accepted, and each end.
        seconds: from the first request to the last.
        quiet_after: seconds after the last answer until nothing ran and all blocks were free.
        restarts: engines after the first.
    """

    faults: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    books: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    quiet_after: float = 0.0
    restarts: int = 0


def storm(
    victim: Victim,
    asks: Sequence[Ask],
    expected: Expected,
    *,
    concurrency: int,
    at_half: Callable[[], None] = lambda: None,
) -> Report:
    """Send all of them to a server that is ready; then see that it is as it was before.

    Args:
        victim: the server.
        asks: the requests.
        expected: what they must be answered.
        concurrency: requests that are under way together.
        at_half: called when half of them have begun, and an answer has.
    """
    wait(lambda: victim.load()["kv_blocks"] > 0, "the engine has told nothing")
    before = _books(victim)
    began = time.monotonic()
    outcomes = asyncio.run(_send_all(victim.url, asks, concurrency, at_half))
    report = Report(outcomes=outcomes, seconds=time.monotonic() - began)
    try:
        report.quiet_after = quiet(victim)
    except CheckFailed as error:
        report.faults.append(f"{error}: {victim.load()}")
    report.restarts = victim.load()["restarts"]
    for ask, outcome in zip(asks, outcomes, strict=True):
        report.faults += faults(ask, outcome, expected)
    report.books = {name: value - before[name] for name, value in _books(victim).items()}
    report.faults += _accounts(asks, outcomes, report.books)
    return report


async def _send_all(url: str, asks: Sequence[Ask], concurrency: int, at_half: Callable[[], None]) -> list[Outcome]:
    places = asyncio.Semaphore(concurrency)
    begun = 0

    async def one(ask: Ask) -> Outcome:
        nonlocal begun
        async with places:
            begun += 1
            if begun == max(1, len(asks) // 2):
                at_half()
            return await (insist if ask.leave is None else send)(url, ask)

    return list(await asyncio.gather(*(one(ask) for ask in asks)))


def quiet(victim: Victim) -> float:
    """Wait until nothing runs or waits and all blocks are free; returns the seconds. Raises CheckFailed."""

    def is_quiet() -> bool:
        load = victim.load()
        idle = not (load["running"] or load["waiting"] or load["swapped"] or load["in_flight"])
        return idle and load["state"] == "ready" and load["kv_blocks"] == load["kv_blocks_free"] > 0

    return wait(is_quiet, "something still runs or holds blocks")


def last_wave(victim: Victim, asks: Sequence[Ask], expected: Expected, signals: Sequence[float] = (0.0,)) -> Report:
    """Send requests, SIGTERM when the first have been let in, and see what the server leaves behind.

    Args:
        victim: the server; it has ended afterwards.
        asks: the requests.
        expected: what they must be answered.
        signals: seconds after that moment at which it gets a signal. With one, what was let in is finished.
    """
    family = victim.family()
    report = Report()

    async def work() -> list[Outcome]:
        sending = [asyncio.create_task(send(victim.url, ask)) for ask in asks]
        await asyncio.to_thread(wait, lambda: victim.load()["in_flight"] > 0, "nothing was let in")
        began = time.monotonic()
        for moment in signals:
            await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
            if victim.process.poll() is None:
                victim.process.send_signal(signal.SIGTERM)
        outcomes = await asyncio.gather(*sending)
        report.seconds = time.monotonic() - began
        return outcomes

    report.outcomes = asyncio.run(work())
    status = victim.process.wait(PATIENCE)
    if status != 0:
        report.faults.append(f"exit status {status}")
    report.faults += [f"process {p.pid} is left" for p in family if not is_gone(p)]
    if "Traceback" in victim.log:
        report.faults.append(f"it wrote {victim.log}")
    for ask, outcome in zip(asks, report.outcomes, strict=True):
        report.faults += _of_the_last(ask, outcome, expected, was_aborted=len(signals) > 1)
    if found := _LAST.search(victim.log):
        report.books = dict(zip(("accepted", *ENDS), map(float, found.groups()), strict=True))
        report.faults += _balance(report.books)
    else:
        report.faults.append("it has not said how its requests ended")
    return report


def _of_the_last(ask: Ask, outcome: Outcome, expected: Expected, *, was_aborted: bool) -> list[str]:
    """Finished, or refused in one clean error, or not even connected: never something in between."""
    was_let_in = outcome.status == 200
    if was_aborted and was_let_in and outcome.is_complete and not outcome.broken:
        return []
    if outcome.is_refused or not (was_let_in or outcome.sequences):
        return []
    return faults(ask, outcome, expected)


def _books(victim: Victim) -> dict[str, float]:
    """Requests that were let in, and how they ended."""
    found = victim.metrics()
    ends = {reason: found[f"vllm:request_success_total{{{reason}}}"] for reason in ENDS}
    return {"accepted": found["titan:requests_accepted_total"], **ends}


def _balance(books: dict[str, float]) -> list[str]:
    ended = sum(books[reason] for reason in ENDS)
    return [] if books["accepted"] == ended else [f"{books['accepted']:.0f} were let in and {ended:.0f} ended: {books}"]


def _accounts(asks: Sequence[Ask], outcomes: Sequence[Outcome], books: dict[str, float]) -> list[str]:
    """The server's books balance, and agree with what the clients know."""
    found = _balance(books)
    known = list(zip(asks, outcomes, strict=True))
    whole = sum(a.is_undisturbed and o.status == 200 and not o.errors for a, o in known)
    good = books["stop"] + books["length"]
    if not whole <= good <= whole + sum(not a.is_undisturbed for a in asks):
        found.append(f"{whole} clients that stayed have whole answers, the server counted {good:.0f}")
    told = sum(o.interrupted for o in outcomes)
    most = told + sum(a.leave is not None for a in asks)
    if not told <= books["error"] <= most:
        found.append(f"{told} answers were interrupted, the server counted {books['error']:.0f} errors")
    return found
