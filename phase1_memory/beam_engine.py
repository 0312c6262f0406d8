"""Beam search on the paged cache: the prompt is computed once, beams share its blocks until they write.

The searches of several prompts run in one batch. A search starts when all blocks that it can ever need are free, so
that it never has to be taken apart: `width` sequences which share only the full blocks of their prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from phase0_prototype.batch import Batch
from phase0_prototype.engine import Engine
from phase0_prototype.errors import UserError
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase1_memory.beam_search import Beams, BeamSearchParams, Branch, Hypothesis
from phase1_memory.kv_cache import PagedKVCache
from phase1_memory.runs import Write


@dataclass
class _Search:
    """One prompt's beams, each a sequence of the cache."""

    index: int
    prompt: list[int]
    beams: Beams
    worst_case: int  # blocks
    live: list[Request] = field(default_factory=list)  # in the order of `beams.live`
    begun: int = 0  # sequences so far, for their names


class BeamEngine:
    """Runs searches on an engine whose cache is paged. What else runs there keeps its blocks and waits.

    Args:
        engine: model, cache and runner.
        max_num_seqs: beams in one forward pass.
    """

    def __init__(self, engine: Engine, max_num_seqs: int) -> None:
        self.engine, self.kv, self.max_num_seqs = engine, engine.kv, max_num_seqs
        assert isinstance(self.kv, PagedKVCache)

    def search(
        self, prompts: list[list[int]], params: BeamSearchParams, advance: Callable[[], object] = lambda: None
    ) -> list[list[Hypothesis]]:
        """The best sequences for each prompt.

        Args:
            prompts: token ids.
            params: the same for all.
            advance: called when a prompt is done.

        Raises:
            UserError: a prompt's beams can't fit; nothing was computed then.
        """
        waiting = deque(self._prepare(i, prompt, params) for i, prompt in enumerate(prompts))
        running: list[_Search] = []
        results: list[list[Hypothesis]] = [[] for _ in prompts]
        free = self.kv.num_free
        try:
            while waiting or running:
                while waiting and self._fits(waiting[0], running, free):
                    running.append(waiting.popleft())
                    self._begin(running[-1])
                self._step([s for s in running if not s.beams.live[0]] or running)
                for search in [s for s in running if s.beams.done]:
                    running.remove(search)
                    results[search.index] = search.beams.best()
                    advance()
        finally:
            for search in running:
                for request in search.live:
                    self.kv.release(request)
        return results

    def _prepare(self, index: int, prompt: list[int], params: BeamSearchParams) -> _Search:
        room = self.engine.max_model_len - len(prompt)
        if room < params.max_tokens:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, with max_tokens {params.max_tokens} that is more than "
                f"max_model_len {self.engine.max_model_len}: shorten the prompt or lower max_tokens"
            )
        full = len(prompt) // self.kv.block_size
        longest = self.kv.tables.pages(len(prompt) + params.max_tokens - 1)  # the last token is never written
        worst = full + params.beam_width * (longest - full)
        if worst > self.kv.num_free:
            raise UserError(
                f"prompt {index}: {params.beam_width} beams of {len(prompt)} + {params.max_tokens} tokens can need "
                f"{worst} blocks, {self.kv.num_free} are free: lower beam_width or max_tokens, or raise num_blocks"
            )
        if params.beam_width > self.max_num_seqs:
            raise UserError(f"beam_width {params.beam_width} is more than max_num_seqs {self.max_num_seqs}: lower it")
        return _Search(index, prompt, Beams(params, self.engine.config.eos_token_ids), worst)

    def _fits(self, search: _Search, running: list[_Search], free: int) -> bool:
        width = search.beams.params.beam_width
        return (
            sum(s.worst_case for s in running) + search.worst_case <= free
            and (len(running) + 1) * width <= self.max_num_seqs
        )  # fmt: skip

    def _begin(self, search: _Search) -> None:
        search.live = [self._request(search, ())]

    def _request(self, search: _Search, tokens: tuple[int, ...]) -> Request:
        search.begun += 1
        name = f"beam {search.index}.{search.begun}"
        params = SamplingParams(temperature=0, ignore_eos=True)
        return Request(name, search.prompt, params, 0, (), len(tokens) + 1, output_token_ids=list(tokens))

    def _step(self, searches: list[_Search]) -> None:
        """One forward pass for all beams of these searches: all at their prompt, or none."""
        beams = [request for search in searches for request in search.live]
        made = self.kv.reserve([Write(r.request_id, r.num_computed_tokens, r.num_tokens) for r in beams])
        assert made, "beams need more blocks than was counted"
        step = Step(tuple(ScheduledRequest(r, r.num_computed_tokens, r.num_new_tokens) for r in beams))
        batch = Batch.build(step, [self.kv.blocks(r) for r in beams], self.kv.block_size, self.engine.device)
        logprobs = torch.log_softmax(self.engine.runner.forward(batch), dim=-1)  # [beams, V] float32
        for request in beams:
            request.num_computed_tokens = self.kv.computed(request, request.num_tokens)
        for search, rows in zip(searches, logprobs.split([len(s.live) for s in searches]), strict=True):
            self._branch(search, search.beams.advance(rows))

    def _branch(self, search: _Search, branches: list[Branch]) -> None:
        """Children take over their parents' blocks. A parent with one child gives it all, one with none frees them."""
        children = [self._request(search, tokens) for tokens in search.beams.live]
        for child, branch in zip(children, branches, strict=True):
            self.kv.fork(search.live[branch.parent], child)
        for request in search.live:
            self.kv.release(request)
        search.live = children
