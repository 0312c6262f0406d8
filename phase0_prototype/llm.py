"""The offline API, in the shape of vLLM's: `LLM("titan-tiny").generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from module0_profiling.course.parts import Use
from phase0_prototype.engine import Engine, build
from phase0_prototype.engine_config import EngineConfig
from phase0_prototype.errors import UserError
from phase0_prototype.outputs import RequestOutput
from phase0_prototype.sampling_params import SamplingParams

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A model that generates.

        llm = LLM("titan-tiny")
        for output in llm.generate(["def add(a, b):", "class Stack:"], SamplingParams(temperature=0, max_tokens=64)):
            print(output.outputs[0].text)

    Args:
        model: directory, shipped name or hub id.
        use: which implementation of the course's parts, as in "phase0=mine".
        assemble: builds the engine; by default that of this phase.
        settings: fields of the phase's `config_type`, as in `dtype="float32", max_num_seqs=8`. An unknown one is an
            error that names it.

    Raises:
        UserError: one line with what is wrong and the remedy.
    """

    config_type: ClassVar[type[EngineConfig]] = EngineConfig  # later phases have more settings

    def __init__(
        self,
        model: str = "titan-tiny",
        *,
        use: str | Use = "",
        assemble: Callable[[Any, Use], Engine] | None = None,
        **settings: Any,
    ) -> None:
        self.config = self.config_type.of(str(model), settings)
        self.engine = (assemble or self._build)(self.config, Use.parse(use) if isinstance(use, str) else use)
        self._streams: dict[str, RequestOutput | None] = {}  # open streams: their newest output that they have not seen

    def _build(self, config: Any, use: Use) -> Engine:
        """The engine of this phase; later phases return theirs."""
        return build(config, use)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Generate for all prompts, batched; results are in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, `{"prompt_token_ids": [...]}`, or a list of these.
            sampling_params: one for all prompts or one for each; by default `SamplingParams()`.
            progress: show a bar on a terminal when there is more than one prompt.

        Raises:
            UserError: naming the prompt; nothing was generated then.
        """
        given = prompts_of(prompts)
        params = _params(sampling_params, len(given))
        ids: list[str] = []
        try:
            for i, (prompt, wanted) in enumerate(zip(given, params, strict=True)):
                try:
                    ids.append(self.engine.add_request(prompt, wanted))
                except UserError as error:
                    raise UserError(f"prompt {i}: {error}" if len(given) > 1 else str(error)) from None
            own, finished = frozenset(ids), dict[str, RequestOutput]()
            with progress_bar(show=progress and len(ids) > 1) as bar:
                task = bar.add_task("generating", total=len(ids), speed=0.0)
                tokens = 0
                while len(finished) < len(ids):
                    for output in self._step(own):
                        tokens += len(output.outputs)
                        if output.finished:
                            finished[output.request_id] = output
                            bar.advance(task)
                    elapsed = bar.tasks[task].elapsed or 0.0
                    bar.update(task, speed=tokens / elapsed if elapsed else 0.0)
        except BaseException:
            for request_id in ids:  # leave nothing behind: the next call starts clean
                self.engine.abort(request_id)
            raise
        return [finished[request_id] for request_id in ids]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt; yields everything so far after each new token. Closing the iterator stops it.

        Several streams may be open, and `generate` be called meanwhile: whoever turns the engine turns it for all, so a
        stream may then yield several new tokens at once.

        Raises:
            UserError: see `generate`; at the first `next`.
        """
        (given,), (params,) = prompts_of([prompt]), _params(sampling_params, 1)
        request_id = self.engine.add_request(given, params)
        self._streams[request_id] = None
        try:
            output: RequestOutput | None = None
            while output is None or not output.finished:
                if self._streams[request_id] is None:
                    self._step(frozenset())
                output, self._streams[request_id] = self._streams[request_id], None
                if output is not None:
                    yield output
        finally:
            del self._streams[request_id]
            self.engine.abort(request_id)

    def _step(self, own: frozenset[str]) -> list[RequestOutput]:
        """One forward pass for everybody; returns the outputs of the requests `own`, keeps those of open streams."""
        outputs = self.engine.step()
        self._streams.update((o.request_id, o) for o in outputs if o.request_id in self._streams)
        return [o for o in outputs if o.request_id in own]


def prompts_of(given: Any) -> list[str | list[int]]:
    """Every accepted way of giving prompts, as a list of texts and lists of token ids."""
    single = isinstance(given, str | Mapping) or (
        isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], int)
    )
    if isinstance(given, bytes) or not (single or isinstance(given, Sequence)):
        raise UserError(f"prompts must be a text, a list of token ids or a list of these, not {type(given).__name__}")
    out: list[str | list[int]] = []
    for i, prompt in enumerate([given] if single else given):
        if isinstance(prompt, Mapping):
            known = {"prompt", "prompt_token_ids"}
            if len(prompt) != 1 or not set(prompt) <= known:
                raise UserError(f"prompt {i} has the keys {list(prompt)}: give either prompt or prompt_token_ids")
            prompt = next(iter(prompt.values()))
        if isinstance(prompt, str):
            out.append(prompt)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            out.append(list(prompt))
        else:
            raise UserError(f"prompt {i} is {type(prompt).__name__}: give a text or a list of token ids")
    return out


def _params(given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    wrong = [given] if not isinstance(given, list | tuple) else [p for p in given if not isinstance(p, SamplingParams)]
    if wrong:
        raise UserError(
            f"sampling_params holds a {type(wrong[0]).__name__}: give SamplingParams, or one for each prompt"
        )
    if len(given) != count:
        raise UserError(f"{len(given)} SamplingParams for {count} prompts: give one, or one for each")
    return list(given)


def progress_bar(*, show: bool) -> Progress:
    """A bar of prompts on stderr, for terminals and notebooks."""
    console = Console(stderr=True)  # what a program prints on stdout stays its own
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (show and (console.is_terminal or console.is_jupyter)),
    )
