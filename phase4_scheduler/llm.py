"""The offline API as of phase 4: phase 3's, with continuous batching."""

from __future__ import annotations

from typing import Any, ClassVar

from module0_profiling.course.parts import Use
from phase0_prototype.engine import Engine
from phase0_prototype.engine_config import EngineConfig
from phase3_paged_attention.llm import LLM as AttentionLLM
from phase4_scheduler.engine import build
from phase4_scheduler.engine_config import ServingConfig


class LLM(AttentionLLM):
    """See phase 1's `LLM`; settings are those of `ServingConfig`."""

    config_type: ClassVar[type[EngineConfig]] = ServingConfig
    config: ServingConfig

    def _build(self, config: Any, use: Use) -> Engine:
        return build(config, use)
