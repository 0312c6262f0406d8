"""The same workloads without a server: all prompts at once through `LLM`, or one batch again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.bench.summary import Spread
from phase4_scheduler.bench.workloads import Prompt, PromptMaker, Workload, fixed

if TYPE_CHECKING:
    from phase0_prototype.llm import LLM
    from phase0_prototype.outputs import RequestOutput


@dataclass(frozen=True)
class Throughput:
    """All requests of a workload at once.

    Attributes:
        duration: seconds from the first request to the last token.
        prompt_tokens, output_tokens: of all of them.
        ttft, e2e: seconds of each, counted from the start of all.
    """

    duration: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    ttft: Spread | None
    e2e: Spread | None

    @property
    def output_rate(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.duration

    def plain(self) -> dict[str, Any]:
        """As plain data, with the rates."""
        total = (self.prompt_tokens + self.output_tokens) / self.duration
        rates = {"request_rate": self.requests / self.duration, "output_rate": self.output_rate, "total_rate": total}
        return asdict(self) | rates


@dataclass(frozen=True)
class Latency:
    """One batch, again and again.

    Attributes:
        batch, prompt, output: sequences; tokens of each prompt and of each answer.
        seconds: of each round.
    """

    batch: int
    prompt: int
    output: int
    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Of the rounds, in seconds."""
        found = Spread.of(self.seconds)
        assert found is not None
        return found

    @property
    def per_token(self) -> float:
        """Seconds for each token of a sequence, in the median round: prompt included, so for long answers a step."""
        return self.spread.p50 / self.output

    def plain(self) -> dict[str, Any]:
        """As plain data, with the distribution."""
        rate = self.batch * self.output / self.spread.p50
        return asdict(self) | {"spread": asdict(self.spread), "per_token": self.per_token, "output_rate": rate}


def measure_throughput(
    llm: LLM, workload: Workload, *, warmup: Workload | None = None, progress: bool = True
) -> Throughput:
    """Generate for all prompts of a workload at once, each answer as long as asked.

    Args:
        llm: of any phase.
        workload: the requests.
        warmup: runs before, untimed: first calls build kernels and fill caches.
        progress: show a bar on a terminal.

    Raises:
        UserError: a prompt and its answer are longer than the engine's `max_model_len`.
    """
    if warmup:
        _generate(llm, [item.prompt for item in warmup.items], [item.output_tokens for item in warmup.items])
    prompts, lengths = [item.prompt for item in workload.items], [item.output_tokens for item in workload.items]
    began = time.perf_counter()
    outputs = _generate(llm, prompts, lengths, progress=progress)
    seconds = time.perf_counter() - began
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    return Throughput(
        duration=seconds,
        requests=len(outputs),
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        ttft=Spread.of([m.time_to_first_token for m in metrics if m.time_to_first_token is not None]),
        e2e=Spread.of([m.latency for m in metrics if m.latency is not None]),
    )


def measure_latency(
    llm: LLM,
    maker: PromptMaker,
    *,
    batch: int = 8,
    prompt: int = 32,
    output: int = 128,
    rounds: int = 10,
    warmup: int = 2,
    observe: Callable[[float], None] | None = None,
) -> Latency:
    """Time a batch of equal requests `rounds` times after `warmup` untimed rounds; the prompts are new each time."""
    for name, value in (
        ("--batch-size", batch),
        ("--input-len", prompt),
        ("--output-len", output),
        ("--iters", rounds),
    ):
        if value < 1:
            raise UserError(f"{name} {value}: give at least 1")
    seconds = []
    for round_ in range(warmup + rounds):
        prompts = [item.prompt for item in fixed(batch, maker, prompt=prompt, output=output).items]
        began = time.perf_counter()
        _generate(llm, prompts, [output] * batch)
        taken = time.perf_counter() - began
        if round_ >= warmup:
            seconds.append(taken)
        if observe:
            observe(taken)
    return Latency(batch, prompt, output, tuple(seconds))


def _generate(llm: LLM, prompts: list[Prompt], lengths: list[int], *, progress: bool = False) -> list[RequestOutput]:
    """Greedy answers of exactly these lengths."""
    given: list[str | list[int]] = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    longest = llm.engine.max_model_len
    for prompt, length in zip(given, lengths, strict=True):
        if not isinstance(prompt, str) and len(prompt) + length > longest:
            asked = f"a prompt of {len(prompt)} tokens and an answer of {length}"
            raise UserError(f"{asked} don't fit max_model_len={longest}: ask for less, or set --max-model-len")
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    return llm.generate(given, params, progress=progress)
