"""The offline API as of phase 3: phase 2's, with a choice of attention and of the cache's numbers."""

from __future__ import annotations

from typing import Any, ClassVar

from module0_profiling.course.parts import Use
from phase0_prototype.engine import Engine
from phase0_prototype.engine_config import EngineConfig
from phase2_rope.llm import LLM as RopeLLM
from phase3_paged_attention.engine import build
from phase3_paged_attention.engine_config import AttentionConfig


class LLM(RopeLLM):
    """See phase 1's `LLM`; settings are those of `AttentionConfig`."""

    config_type: ClassVar[type[EngineConfig]] = AttentionConfig
    config: AttentionConfig

    def _build(self, config: Any, use: Use) -> Engine:
        return build(config, use)
