"""Phase 4: who runs when, and a server.

    from phase4_scheduler import LLM, AsyncLLM, SamplingParams

The names are loaded when they are first used, so that importing the package (as `titan --help` does) costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import phase0_prototype  # noqa: F401  sets how torch allocates, before it is imported

if TYPE_CHECKING:
    from phase0_prototype.outputs import RequestOutput
    from phase0_prototype.sampling_params import SamplingParams
    from phase1_memory.beam_search import BeamSearchParams
    from phase4_scheduler.async_llm import AsyncLLM
    from phase4_scheduler.llm import LLM

__all__ = ["LLM", "AsyncLLM", "BeamSearchParams", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "phase4_scheduler.llm",
    "AsyncLLM": "phase4_scheduler.async_llm",
    "BeamSearchParams": "phase1_memory.beam_search",
    "RequestOutput": "phase0_prototype.outputs",
    "SamplingParams": "phase0_prototype.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
