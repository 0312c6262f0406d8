"""Benchmark cases of what stands before the model: processes, messages, text, HTTP. The engine has none."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from module0_profiling.bench import Options, figure
from module0_profiling.results import Figure
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.async_llm import AsyncLLM
from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.client import Target
from phase4_scheduler.bench.load import run_load
from phase4_scheduler.bench.summary import summarise
from phase4_scheduler.bench.workloads import PromptMaker, WorkItem, Workload, fixed
from phase4_scheduler.measures import our_server
from phase4_scheduler.measures.loads import Load, send
from phase4_scheduler.measures.our_server import NULL
from phase4_scheduler.measures.servers import Server

STREAMS = 64
STEP = 0.0115  # seconds: 64 streams get 5,565 tokens/s of it, if nothing is in the way
PROMPT, TOKENS = 16, 800  # long answers: that all begin at once is not what a gap between tokens is about
ASKED = 60  # first tokens that a round compares


def null_serving(options: Options) -> tuple[Figure, ...]:
    """64 streams of an engine without a model, client and both processes of the server on this machine.

    With steps of 11.5 ms: tokens/s of 5,565 that there are, and what a token comes later than its step. With steps of
    no time: how many there could be.
    """
    figures: list[Figure] = []
    streams, tokens = options.size(STREAMS, 2), options.size(TOKENS, 4)
    load = Load("64 streams", partial(fixed, streams, prompt=PROMPT, output=tokens), streams)
    for name, step in (("paced", STEP), ("as fast as it can", 0.0)):
        with Server(our_server.launch(NULL, {"step_seconds": step, "max_num_seqs": streams})) as server:
            server.wait_until_ready()
            _, *done = [send(server.url, load, seed) for seed in range(options.rounds + 1)]
        figures.append(figure(f"{name}/tokens", [d.output_rate for d in done], "tokens/s"))
        figures.append(figure(f"{name}/tokens a chunk", [d.tokens_per_chunk for d in done], "tokens"))
        figures.append(figure(f"{name}/client", [100 * d.client_busy for d in done], "% of a core"))
        if step:
            for percentile in ("p50", "p99"):
                late = [1e3 * (getattr(d.itl, percentile) - step) for d in done]
                figures.append(Figure(f"{name}/later than a step, {percentile}", sorted(late)[len(late) // 2], "ms"))
    return tuple(figures)


def http_overhead(options: Options) -> tuple[Figure, ...]:
    """The first token of `titan serve` over HTTP and of `AsyncLLM` in this process, in turns, one request at a time.

    Both have an engine without a model in a process of its own; steps take 1 ms.
    """
    return asyncio.run(_http_overhead(options))


async def _http_overhead(options: Options) -> tuple[Figure, ...]:
    settings = {"step_seconds": 0.001}
    llm = AsyncLLM(NULL, settings)
    await llm.start()
    try:
        await llm.ready()
        with Server(our_server.launch(NULL, settings)) as server:
            server.wait_until_ready()
            item = WorkItem(PromptMaker(0).make(128), 2)
            http: list[float] = []
            direct: list[float] = []
            for i in range(options.size(ASKED * options.rounds, 2) + 1):
                turns = [(http, _over_http(server.url, item)), (direct, _direct(llm, item))]
                for taken, ask in turns if i % 2 else reversed(turns):
                    seconds = await ask
                    if i:
                        taken.append(seconds)
    finally:
        await llm.shutdown()
    more = [1e3 * (a - b) for a, b in zip(http, direct, strict=True)]
    return (
        figure("first token/over HTTP", [1e3 * s for s in http], "ms"),
        figure("first token/AsyncLLM", [1e3 * s for s in direct], "ms"),
        Figure("first token/HTTP adds", sorted(more)[len(more) // 2], "ms", note="median of the differences"),
        Figure("first token/HTTP adds, p90", sorted(more)[int(0.9 * len(more))], "ms"),
    )


async def _over_http(url: str, item: WorkItem) -> float:
    result = await run_load(Target(url, model="model"), Workload("one", (item,)), Arrival.closed_loop(1))
    spread = summarise(result).ttft
    assert spread is not None
    return spread.mean


async def _direct(llm: AsyncLLM, item: WorkItem) -> float:
    assert not isinstance(item.prompt, str)
    params = SamplingParams(temperature=0, max_tokens=item.output_tokens, ignore_eos=True)
    began = time.perf_counter()
    first = 0.0
    async with llm.submit(list(item.prompt), params) as stream:
        async for _ in stream:
            first = first or time.perf_counter()
    return first - began
