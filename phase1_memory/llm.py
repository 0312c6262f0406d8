"""The offline API as of phase 1: phase 0's, with a paged cache and beam search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from module0_profiling.course.parts import Use
from phase0_prototype.engine import Engine
from phase0_prototype.engine_config import EngineConfig
from phase0_prototype.llm import LLM as PrototypeLLM
from phase0_prototype.llm import Prompt, progress_bar, prompts_of
from phase0_prototype.outputs import CompletionOutput, RequestMetrics, RequestOutput
from phase1_memory.beam_engine import BeamEngine
from phase1_memory.beam_search import BeamSearchParams, Hypothesis
from phase1_memory.engine import build
from phase1_memory.engine_config import PagedConfig


class LLM(PrototypeLLM):
    """See phase 0's `LLM`; settings are those of `PagedConfig`."""

    config_type: ClassVar[type[EngineConfig]] = PagedConfig
    config: PagedConfig

    def _build(self, config: Any, use: Use) -> Engine:
        return build(config, use)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, progress: bool = True
    ) -> list[RequestOutput]:
        """The most likely continuations of each prompt that a search of `params.beam_width` beams finds.

        Args:
            prompts: as for `generate`.
            params: width, length and when to stop; the same for all prompts.
            progress: show a bar on a terminal when there is more than one prompt.

        Returns:
            For each prompt its sequences, best first; `cumulative_logprob` is the sum that they are ranked by, before
            it is divided by length ** length_penalty.

        Raises:
            UserError: naming the prompt; nothing was computed then.
        """
        begin = time.perf_counter()
        given = prompts_of(prompts)
        ids = [self.engine.encode(prompt) for prompt in given]
        with progress_bar(show=progress and len(given) > 1) as bar:
            task = bar.add_task("searching", total=len(given), speed=0.0)
            found = BeamEngine(self.engine, self.config.max_seqs).search(ids, params, lambda: bar.advance(task))
        metrics = RequestMetrics(begin, None, time.perf_counter())
        return [
            RequestOutput(
                f"beam-{i}",
                prompt if isinstance(prompt, str) else None,
                tokens,
                None,
                [self._completion(k, hypothesis) for k, hypothesis in enumerate(best)],
                True,
                metrics,
            )
            for i, (prompt, tokens, best) in enumerate(zip(given, ids, found, strict=True))
        ]

    def _completion(self, index: int, hypothesis: Hypothesis) -> CompletionOutput:
        shown = list(hypothesis.token_ids)
        if hypothesis.finish_reason == "stop":
            del shown[-1]
        tokenizer = self.engine.tokenizer
        return CompletionOutput(
            index,
            tokenizer.decode(shown) if tokenizer else "",
            list(hypothesis.token_ids),
            hypothesis.cumulative_logprob,
            None,
            hypothesis.finish_reason,
            hypothesis.stop_reason,
        )
