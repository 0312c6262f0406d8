"""What the ratio gates of the server measure, and how busy a GPU is."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from module0_profiling import rooms
from module0_profiling.bench import Options
from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase0_prototype.workloads import SHAPE, random_checkpoint
from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.client import Target
from phase4_scheduler.bench.load import run_load
from phase4_scheduler.bench.samples import LoadResult
from phase4_scheduler.bench.workloads import PromptMaker, WorkItem, Workload, fixed, mixed
from phase4_scheduler.measures import our_server, vllm_peer
from phase4_scheduler.measures.loads import Load, compare
from phase4_scheduler.measures.our_server import NULL
from phase4_scheduler.measures.servers import Launch, Server, free_port

ROUNDS = 3
BESIDE = (
    Load("8 at a time", partial(fixed, 16, prompt=128, output=32), 8),
    Load("short and long, 16 at a time", partial(mixed, 32, prompt=128), 16),
)
STREAMS, TOKENS = 64, 800
STEP = 0.0115  # seconds: 64 streams get 5,565 tokens/s of it, if nothing is in the way
WINDOW = 25.0  # seconds after which nobody waits for the rest
ASKED, SHORT = 15, 40  # answers of so many tokens, in steps of 5 ms


def null_tokens(use: Use) -> Measured:
    """Output tokens/s of 64 streams, from an engine without a model whose steps leave room for 5,565."""
    settings = {"step_seconds": STEP, "max_num_seqs": STREAMS}
    with Server(_served(use, settings)) as server:
        server.wait_until_ready()
        done = asyncio.run(_load(server.url, fixed(STREAMS, PromptMaker(0), prompt=16, output=TOKENS)))
    tokens = sum(sample.output_tokens if sample.ok else len(sample.times) for sample in done.samples)
    complete = sum(sample.ok for sample in done.samples)
    client = done.cpu_seconds / done.duration
    return Measured(tokens / done.duration, f"{complete} of {STREAMS} answers; the client used {client:.0%} of a core")


def first_token_added(use: Use) -> Measured:
    """Milliseconds from the engine's first token to the client's first chunk: the median of requests one by one."""
    with Server(_served(use, {"step_seconds": 0.005})) as server:
        server.wait_until_ready()
        over_http = [asyncio.run(_first(server.url, seed)) for seed in range(ASKED)]
    return Measured(1e3 * (statistics.median(over_http) - 0.005), f"answers of {SHORT} tokens, steps of 5 ms")


def over_vllm(use: Use) -> Measured:
    """Output tokens/s over those of vLLM, both up at once and served in turns: the least of two loads."""
    options = Options("cpu", ROUNDS, rooms.ROOT / "build" / SHAPE, Console(stderr=True))
    sizes: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 64}
    with random_checkpoint(SHAPE, options.checkpoint) as directory:
        settings = our_server.serving_settings("cpu", **sizes) | {"dtype": "bfloat16"}
        ours = our_server.launch(str(directory), settings)
        ours = replace(ours, arguments=[*ours.arguments, "--use", str(use.complete())])
        found = compare([ours, vllm_peer.launch(directory, free_port(), device="cpu", **sizes)], BESIDE, options)
    ratios = {f.name.partition("/")[0]: f.value for f in found if "/over " in f.name}
    return Measured(min(ratios.values()), ", ".join(f"{name}: {value:.2f}" for name, value in ratios.items()))


def gpu_busy(use: Use) -> Measured:
    """Share of decode steps in which a kernel runs, the worst of batches 1, 8 and 64: the 1.1B shape, bfloat16."""
    from phase0_prototype.workloads import random_prompts
    from phase4_scheduler.llm import LLM
    from phase4_scheduler.measures.gpu_cases import busy_share

    with random_checkpoint(SHAPE) as directory:
        llm = LLM(
            str(directory), dtype="bfloat16", device="cuda", use=use, async_scheduling="on", max_num_seqs=64,
            max_model_len=512, num_blocks=2048,
        )  # fmt: skip
    vocab = llm.engine.config.vocab_size
    shares = {batch: busy_share(llm, random_prompts(vocab, [128] * batch), 64) for batch in (1, 8, 64)}
    return Measured(min(shares.values()), ", ".join(f"batch {batch}: {share:.3f}" for batch, share in shares.items()))


def _served(use: Use, settings: dict[str, float]) -> Launch:
    launch = our_server.launch(NULL, settings)
    return replace(launch, arguments=[*launch.arguments, "--use", str(use.complete())])


async def _load(url: str, workload: Workload) -> LoadResult:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(WINDOW, stop.set)
    return await run_load(Target(url, model="model"), workload, Arrival.closed_loop(STREAMS), stop=stop)


async def _first(url: str, seed: int) -> float:
    workload = Workload("one", (WorkItem(PromptMaker(seed).make(128), SHORT),))
    done = await run_load(Target(url, model="model"), workload, Arrival.closed_loop(1))
    found = done.samples[0].ttft
    assert found is not None, done.samples[0].error
    return found
