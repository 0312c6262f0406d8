"""The offline API as of phase 2: phase 1's, for more models."""

from __future__ import annotations

from typing import Any

from module0_profiling.course.parts import Use
from phase0_prototype.engine import Engine
from phase1_memory.llm import LLM as PagedLLM
from phase2_rope.engine import build


class LLM(PagedLLM):
    """See phase 1's `LLM`."""

    def _build(self, config: Any, use: Use) -> Engine:
        return build(config, use)
