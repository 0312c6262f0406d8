"""What `titan bench throughput` and `titan bench latency` do with an engine: measure, show, write."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from phase4_scheduler.bench import result_file, tables
from phase4_scheduler.bench.offline import measure_latency, measure_throughput
from phase4_scheduler.bench.workloads import PromptMaker, Workload

if TYPE_CHECKING:
    from phase0_prototype.llm import LLM


def throughput(llm: LLM, workload: Workload, warmup: Workload, out: Path | None) -> None:
    """Run a workload at once, print rates and times, write the JSON.

    Raises:
        UserError: a request doesn't fit the engine.
    """
    began = time.time()
    found = measure_throughput(llm, workload, warmup=warmup)
    plain, console = found.plain(), Console(highlight=False)
    console.print(
        f"{llm.config.model} on {llm.engine.device}; {workload.name}; {found.requests} requests", markup=False
    )
    rates = {
        "duration, s": found.duration,
        "requests/s": plain["request_rate"],
        "output tokens/s": found.output_rate,
        "total tokens/s": plain["total_rate"],
    }
    console.print(tables.of_pairs(rates))
    console.print(tables.of_times({"time to first token": found.ttft, "end to end": found.e2e}))
    _write(llm, "throughput", {"workload": workload.name}, plain, began, out, console)


def latency(
    llm: LLM, maker: PromptMaker, batch: int, prompt: int, output: int, rounds: int, warmup: int, out: Path | None
) -> None:
    """Time one batch again and again, print the distribution, write the JSON.

    Raises:
        UserError: a size makes no sense, or the batch doesn't fit the engine.
    """
    began, console = time.time(), Console(highlight=False)
    with Console(stderr=True).status("") as status:
        found = measure_latency(
            llm,
            maker,
            batch=batch,
            prompt=prompt,
            output=output,
            rounds=rounds,
            warmup=warmup,
            observe=lambda seconds: status.update(f"the last round took {seconds:.3f} s"),
        )
    plain = found.plain()
    console.print(
        f"{llm.config.model} on {llm.engine.device}; {batch} prompts of {prompt} tokens, answers of {output}",
        markup=False,
    )
    console.print(tables.of_times({"a batch": found.spread}))
    rates = {"a token of each, ms": 1e3 * found.per_token, "output tokens/s": plain["output_rate"]}
    console.print(tables.of_pairs(rates))
    _write(llm, "latency", {"warmup": warmup}, plain, began, out, console)


def _write(
    llm: LLM, kind: str, more: dict[str, Any], summary: dict[str, Any], began: float, out: Path | None, console: Console
) -> None:
    if out:
        config = {**more, "engine": asdict(llm.config), "device": str(llm.engine.device)}
        path = result_file.write(out, kind, {"config": config, "summary": summary}, began)
        console.print(str(path), markup=False, soft_wrap=True)
