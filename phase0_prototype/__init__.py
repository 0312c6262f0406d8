"""Phase 0: the model, its weights, the offline API and the spine of the engine.

    from phase0_prototype import LLM, SamplingParams

Both names are loaded when they are first used, so that importing the package (as `titan --help` does) costs no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phase0_prototype.llm import LLM
    from phase0_prototype.outputs import RequestOutput
    from phase0_prototype.sampling_params import SamplingParams

# torch reads this at its first allocation: weights in huge pages are read faster on a CPU. Later settings do nothing.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["LLM", "RequestOutput", "SamplingParams"]

_HOMES = {"LLM": "llm", "RequestOutput": "outputs", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
