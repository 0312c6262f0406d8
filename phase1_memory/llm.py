"""The offline API as of phase 1: phase 0's, with a paged cache and beam search."""

from __future__ import annotations

from typing import Any, ClassVar

from module0_profiling.course.parts import Use
from phase0_prototype.engine import Engine
from phase0_prototype.engine_config import EngineConfig
from phase0_prototype.llm import LLM as PrototypeLLM
from phase1_memory.engine import build
from phase1_memory.engine_config import PagedConfig


class LLM(PrototypeLLM):
    """See phase 0's `LLM`; settings are those of `PagedConfig`."""

    config_type: ClassVar[type[EngineConfig]] = PagedConfig

    def _build(self, config: Any, use: Use) -> Engine:
        return build(config, use)
