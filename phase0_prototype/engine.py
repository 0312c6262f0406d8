"""The engine as of phase 0: prompts in, text out, around a loop that knows tokens only.

Request -> Scheduler.next_step() -> Step -> Executor (Runner.forward(Batch), sample) -> Scheduler.finish() -> Output
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from module0_profiling.course.parts import Use, resolve
from module0_profiling.ranges import span
from phase0_prototype.answers import Answer
from phase0_prototype.attention import TorchAttention
from phase0_prototype.config import ModelConfig
from phase0_prototype.engine_config import EngineConfig, resolve_lengths
from phase0_prototype.errors import UserError
from phase0_prototype.executor import Executor
from phase0_prototype.loading import describe
from phase0_prototype.loop import Loop
from phase0_prototype.outputs import RequestOutput
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.seeds import derive_seed
from phase0_prototype.step import StepTokens
from phase0_prototype.tokenizer import Tokenizer, load_tokenizer

ROOM = __name__.rpartition(".")[0]


class Engine:
    """Requests in, outputs out, one forward pass at a time. Assembled by `build`.

    Args:
        model, kv, scheduler, runner: the parts (of the solution, the framework or the learner).
        loop: turns scheduler and executor; a later phase has another.
        config: the model's.
        tokenizer: None for checkpoints without one; prompts are token ids then, and text stays empty.
        max_model_len: longest sequence, prompt included.
        seed: random choices of requests without a seed derive from it and from the request's number.
    """

    def __init__(
        self,
        model: Any,
        kv: Any,
        scheduler: Any,
        runner: Any,
        *,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        device: torch.device,
        seed: int,
        loop: Callable[[Any, Executor], Loop] = Loop,
    ) -> None:
        self.model, self.kv, self.scheduler, self.runner = model, kv, scheduler, runner
        self.config, self.tokenizer, self.max_model_len, self.device = config, tokenizer, max_model_len, device
        self.loop = loop(scheduler, Executor(kv, runner, device))
        self._seed = seed
        self._answers: dict[str, Answer] = {}  # by request id of the prompt
        self._of_request: dict[str, Answer] = {}  # by request id of the sequence
        self._count = 0

    def add_request(self, prompt: str | list[int], params: SamplingParams) -> str:
        """Queue a prompt, given as text or token ids; returns its id.

        Raises:
            UserError: the prompt is empty, too long, holds unknown ids, or is text and there is no tokenizer.
        """
        prompt_ids = self.encode(prompt)
        room = self.max_model_len - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens, max_model_len is {self.max_model_len} and one must be left "
                "for the answer: shorten the prompt or raise max_model_len"
            )
        request_id = str(self._count)
        seed = derive_seed(self._seed, self._count) if params.seed is None else params.seed
        self._count += 1
        requests = [
            Request(
                request_id if params.n == 1 else f"{request_id}.{i}",
                prompt_ids,
                params,
                derive_seed(seed, i) if i else seed,
                () if params.ignore_eos else self.config.eos_token_ids,
                min(params.max_tokens or room, room),
                index=i,
                group=request_id,
            )
            for i in range(params.n)
        ]
        answer = Answer(request_id, prompt if isinstance(prompt, str) else None, requests, self.tokenizer)
        self._answers[request_id] = answer
        for request in requests:
            self._of_request[request.request_id] = answer
            self.scheduler.add(request)
        return request_id

    def has_unfinished(self) -> bool:
        """Whether a further `step` has work."""
        return bool(self.loop.has_unfinished())

    def step(self) -> list[RequestOutput]:
        """One forward pass; returns the prompts that got new tokens, each with all of its outputs so far."""
        done = self.loop.step()
        with span("detokenise"):
            return self._answer(done, time.perf_counter())

    def abort(self, request_id: str) -> None:
        """Stop a prompt's sequences and free what they hold; unknown or finished ids are ignored."""
        answer = self._answers.get(request_id)
        if answer is not None:
            for request in answer.requests:
                self.scheduler.abort(request)
            self._forget(request_id)

    def abort_all(self) -> None:
        """Stop everything."""
        for request_id in list(self._answers):
            self.abort(request_id)

    def _answer(self, done: StepTokens, now: float) -> list[RequestOutput]:
        """Turn each sequence's new token into text; returns the outputs of their prompts."""
        for request, start, logprobs in done.prompt_logprobs:
            if (answer := self._of_request.get(request.request_id)) is not None:
                answer.take_prompt(request, start, logprobs)
        touched: dict[str, Answer] = {}
        for row, request in zip(done.rows, done.requests, strict=True):
            answer = self._of_request[request.request_id]
            answer.take_token(request, done.logprobs, row, now)
            if answer.stopped_by(request) is not None and request.finish_reason is None:
                self.scheduler.abort(request, "stop")
            if request.finish_reason is not None:
                answer.finish(request, now)
            touched[answer.request_id] = answer
        for request in done.step.rejected:
            if (answer := self._of_request.get(request.request_id)) is not None:
                touched[request.group] = answer
                answer.finish(request, now)
        outputs = [answer.output() for answer in touched.values()]
        for output in outputs:
            if output.finished:
                self._forget(output.request_id)
        return outputs

    def _forget(self, request_id: str) -> None:
        for request in self._answers.pop(request_id).requests:
            del self._of_request[request.request_id]

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt. Raises UserError for an empty one, one without a tokenizer, and ids out of range."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("this checkpoint has no tokenizer.json: give the prompt as token ids")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise UserError("the prompt is empty: give at least one token")
        unknown = next((i for i in ids if type(i) is not int or not 0 <= i < self.config.vocab_size), None)
        if unknown is not None:
            raise UserError(f"token id {unknown!r} is not an integer of the vocabulary 0..{self.config.vocab_size - 1}")
        return ids


def build(
    config: EngineConfig, use: Use | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Engine:
    """Load a checkpoint and assemble an engine around it.

    Args:
        config: the settings.
        use: which implementation of the course's parts; by default the learner's where there is one.
        advance: called with (bytes loaded, bytes in all) while weights load.

    Raises:
        UserError: anything about model, device or sizes that the user can put right.
    """
    use = use or Use()
    parts = {name: resolve(ROOM, name, use) for name in ("model", "kv_cache", "scheduler", "runner")}
    described = describe(config, parts["model"].DecoderModel, TorchAttention())
    model, device = described.model, described.device
    max_model_len, max_num_seqs = resolve_lengths(config, described.config, model.kv_spec, model.weight_bytes, device)
    described.load(advance)
    kv = parts["kv_cache"].KVCache(model.kv_spec, max_num_seqs, max_model_len, device)
    return Engine(
        model,
        kv,
        parts["scheduler"].Scheduler(kv, config.max_num_batched_tokens),
        parts["runner"].RUNNERS[described.runner](model, kv),
        config=described.config,
        tokenizer=load_tokenizer(described.directory),
        max_model_len=max_model_len,
        device=device,
        seed=config.seed,
    )
