"""Benchmark cases of the engine on titan-tiny: what chunks of prompts and continuous batches bring."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.results import Figure
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import TINY, random_prompts
from phase4_scheduler.llm import LLM
from phase4_scheduler.measures.scheduling_cases import percentile

VOCAB = 4096
DECODES = 8
LONG_PROMPT = 900
BUDGET = 64  # tokens of a step with chunks: 14 pieces of a long prompt
EVERY = 40  # steps between two long prompts
PLACES = 8
SHORT, LONG, PROMPT = 10, 200, 32


def chunking(options: Options) -> tuple[Figure, ...]:
    """Gaps between the tokens of eight sequences while long prompts come, and tokens/s of short and long answers."""
    chunked: dict[str, Any] = {"max_num_batched_tokens": BUDGET + DECODES}
    whole: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": LONG_PROMPT + DECODES}
    engine = partial(LLM, TINY, device=options.device, max_num_seqs=DECODES + 1, num_blocks=1024)
    llms = {
        "in chunks": engine(use="phase4=solution", **chunked),
        "whole prompts": engine(use="phase4=solution", **whole),
        "static batches": engine(use="phase4=framework", max_num_batched_tokens=LONG_PROMPT + DECODES),
    }
    return (*_gaps(llms, options), *_throughput(llms, options))


def _gaps(llms: dict[str, LLM], options: Options) -> list[Figure]:
    found: dict[str, list[list[float]]] = {name: [] for name in llms}
    prompts: dict[str, list[float]] = {name: [] for name in llms}
    for round_ in range(options.rounds + 1):
        for name in list(llms) if round_ % 2 else reversed(list(llms)):
            every, long_prompt = options.size(EVERY, 4), options.size(LONG_PROMPT, 40)
            gaps, first = _disturbed(llms[name], every, long_prompt, round_)
            if round_:
                found[name].append(sorted(gaps))
                prompts[name].append(first)
    figures = []
    for name, rounds in found.items():
        figures.append(figure(f"a token more, p50/{name}", [1e3 * percentile(gaps, 0.5) for gaps in rounds], "ms"))
        figures.append(figure(f"a token more, p99/{name}", [1e3 * percentile(gaps, 0.99) for gaps in rounds], "ms"))
        figures.append(figure(f"first token of the long/{name}", [1e3 * s for s in prompts[name]], "ms"))
    p99 = {name: [percentile(gaps, 0.99) for gaps in rounds] for name, rounds in found.items()}
    figures.append(ratio("a token more, p99/whole over chunks", p99["whole prompts"], p99["in chunks"]))
    return figures


def _disturbed(llm: LLM, every: int, long_prompt: int, seed: int) -> tuple[list[float], float]:
    """Seconds between tokens of sequences that generate, and to the first token of a long prompt, on average."""
    engine, steps = llm.engine, 3 * every
    decoding = [engine.add_request(p, _exactly(steps)) for p in random_prompts(VOCAB, [PROMPT] * DECODES, seed)]
    stamps: dict[str, list[float]] = {request_id: [] for request_id in decoding}
    arrived: dict[str, float] = {}
    first: list[float] = []
    turns = 0
    while any(len(times) < steps for times in stamps.values()) or len(first) < len(arrived):
        if turns % every == every // 2 and not all(len(times) >= steps for times in stamps.values()):
            (prompt,) = random_prompts(VOCAB, [long_prompt], 1000 * seed + turns)
            arrived[engine.add_request(prompt, _exactly(1))] = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id in stamps:
                stamps[output.request_id].append(now)
            else:
                first.append(now - arrived[output.request_id])
        turns += 1
    gaps = [after - before for times in stamps.values() for before, after in pairwise(times)]
    return gaps, sum(first) / max(1, len(first))


def _throughput(llms: dict[str, LLM], options: Options) -> list[Figure]:
    """Half short, half long answers, three times as many as there are places."""
    count = options.size(3 * PLACES, 4)
    lengths = [SHORT if i % 2 else LONG for i in range(count)] if not options.dry else [2, 3] * (count // 2)
    subjects: dict[str, Callable[[int], float]] = {
        "continuous batches": partial(_serve, llms["in chunks"], lengths),
        "static batches": partial(_serve, llms["static batches"], lengths),
    }
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for round_ in range(options.rounds + 1):
        for name in list(subjects) if round_ % 2 else reversed(list(subjects)):
            seconds = subjects[name](round_)
            if round_:
                rates[name].append(sum(lengths) / seconds)
    figures = [figure(f"short and long answers/{name}", values, "tokens/s") for name, values in rates.items()]
    return [*figures, ratio("short and long answers/speedup", rates["continuous batches"], rates["static batches"])]


def _serve(llm: LLM, lengths: Sequence[int], seed: int) -> float:
    """Seconds until all have ended."""
    engine = llm.engine
    began = time.perf_counter()
    for prompt, length in zip(random_prompts(VOCAB, [PROMPT] * len(lengths), seed), lengths, strict=True):
        engine.add_request(prompt, _exactly(length))
    while engine.has_unfinished():
        engine.step()
    return time.perf_counter() - began


def _exactly(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
