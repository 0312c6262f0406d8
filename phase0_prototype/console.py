"""Generation on a terminal: stream the text, then say how fast it was and how near to what the memory allows."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from module0_profiling.hardware import detect, measured_peaks
from phase0_prototype.llm import LLM, Prompt
from phase0_prototype.outputs import RequestOutput
from phase0_prototype.sampling_params import SamplingParams


@dataclass(frozen=True)
class Speed:
    """How fast one streamed generation was.

    Attributes:
        tokens: generated.
        first_token: seconds from the request to its first token.
        rate: tokens/s after the first.
        bytes_per_token: weights and cache that each decode step read, on average.
    """

    tokens: int
    first_token: float
    rate: float
    bytes_per_token: float

    @property
    def bandwidth(self) -> float:
        """Bytes/s that the decode steps read."""
        return self.rate * self.bytes_per_token


def stream(llm: LLM, prompt: Prompt, params: SamplingParams, *, echo: bool = True) -> Speed:
    """Print a generation while it happens and return its speed."""
    if echo and isinstance(prompt, str):
        sys.stdout.write(prompt)
    shown = 0
    output: RequestOutput | None = None
    for output in llm.stream(prompt, params):
        completion = output.outputs[0]
        text = completion.text if llm.engine.tokenizer else " ".join(map(str, completion.token_ids)) + " "
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
    sys.stdout.write("\n")
    assert output is not None and output.metrics is not None
    return speed_of(llm, output)


def speed_of(llm: LLM, output: RequestOutput) -> Speed:
    """Speed of a finished request that ran alone."""
    metrics = output.metrics
    assert metrics is not None and metrics.first_token_time and metrics.finished_time
    tokens = len(output.outputs[0].token_ids)
    seconds = metrics.finished_time - metrics.first_token_time
    context = len(output.prompt_token_ids) + tokens / 2
    kv_bytes = llm.engine.model.kv_spec.bytes_per_token * context
    return Speed(
        tokens,
        metrics.first_token_time - metrics.arrival_time,
        (tokens - 1) / seconds if seconds else 0.0,
        llm.engine.model.weight_bytes + kv_bytes,
    )


def summary(llm: LLM, speed: Speed) -> str:
    """One paragraph: tokens/s, bytes read, and the share of this machine's measured read bandwidth."""
    device = detect(str(llm.engine.device))
    peaks = measured_peaks(device)
    megabytes = speed.bytes_per_token / 1e6
    lines = [
        f"{speed.tokens} tokens, the first after {speed.first_token * 1e3:.0f} ms, then {speed.rate:,.0f} tokens/s "
        f"({llm.engine.device}, {str(llm.engine.model.kv_spec.dtype).removeprefix('torch.')}).",
        f"Each token reads {megabytes:,.1f} MB of weights and cache: {speed.bandwidth / 1e9:.1f} GB/s, "
        f"{100 * speed.bandwidth / peaks.read_bandwidth:.0f} % of the {peaks.read_bandwidth / 1e9:.1f} GB/s that this "
        "machine reads.",
    ]
    if device.kind == "cpu" and speed.bytes_per_token < device.cache_bytes:
        lines.append("(A model this small lives in the CPU's cache; what holds it back is the cost of each operation.)")
    return "\n".join(lines)


def side_by_side(llms: Mapping[str, LLM], prompt: Prompt, params: SamplingParams, rounds: int = 3) -> str:
    """One line with the tokens/s of several engines for one prompt; they take turns."""
    rates: dict[str, list[float]] = {name: [] for name in llms}
    for round_ in range(rounds + 1):
        for name, llm in llms.items():
            (output,) = llm.generate(prompt, params, progress=False)
            if round_:  # the first is to warm up
                rates[name].append(speed_of(llm, output).rate)
    told = (f"{name} {statistics.median(values):,.0f}" for name, values in rates.items())
    return f"In turns: {', '.join(told)} tokens/s."
