"""Phase 3: attention where the cache lies, in pages, and a cache of smaller numbers.

    from phase3_paged_attention import LLM, SamplingParams

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
    from phase3_paged_attention.llm import LLM

__all__ = ["LLM", "BeamSearchParams", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "phase3_paged_attention.llm",
    "BeamSearchParams": "phase1_memory.beam_search",
    "RequestOutput": "phase0_prototype.outputs",
    "SamplingParams": "phase0_prototype.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
