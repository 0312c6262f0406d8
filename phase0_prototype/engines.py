"""Which phase's engine a command runs: a room that has an engine has `llm.py` with the class `LLM`."""

from __future__ import annotations

import importlib

from module0_profiling import rooms
from phase0_prototype.llm import LLM


def rooms_with_an_engine() -> list[str]:
    """In the order of the course: the last has the newest."""
    return [room for room in rooms.discover() if (rooms.ROOT / room / "llm.py").is_file()]


def llm_of(phase: str = "") -> type[LLM]:
    """The `LLM` of a phase ("phase0", "0" or "phase0_prototype"), by default of the newest.

    Raises:
        UnknownPhaseError: there is no such phase, or it has no engine.
    """
    having = rooms_with_an_engine()
    room = rooms.room(phase) if phase else having[-1]
    if room not in having:
        raise rooms.UnknownPhaseError(
            f"{phase} has no engine: those that have one are {', '.join(rooms.phase(r) for r in having)}"
        )
    found: type[LLM] = importlib.import_module(f"{room}.llm").LLM
    return found


def before(phase: str) -> str:
    """The phase whose engine comes before this one's; "" for the first."""
    having = rooms_with_an_engine()
    place = having.index(rooms.room(phase))
    return rooms.phase(having[place - 1]) if place else ""
