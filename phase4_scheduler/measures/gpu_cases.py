"""Benchmark cases of this phase on a GPU: is it busy, and how much of its bandwidth does one sequence get.

In a dry run they go through the same steps with titan-tiny on the CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.results import Figure
from phase0_prototype import workloads
from phase0_prototype.bandwidth import decode_shares
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import SHAPE, TINY, in_turns, random_prompts
from phase4_scheduler.llm import LLM

BATCHES = (1, 8, 64)
PROMPT = 128
STEPS = 64  # that are profiled
LOOPS = {"one after the other": "off", "one ahead": "on"}
Interval = tuple[float, float]


def check_ahead(device: str, *, dry: bool = False) -> tuple[Figure, ...]:
    """Greedy tokens in float32 of sequences that come and go: one step ahead must choose those of one after the other.

    Raises:
        CheckFailed: it does not; the first sequence that differs.
    """
    lengths = (5, 9) if dry else workloads.LENGTHS_OF_8
    new = 4 if dry else 48
    chosen: dict[str, list[list[int]]] = {}
    for name, on in LOOPS.items():
        llm = LLM(
            TINY, dtype="float32", device=device, max_num_seqs=len(lengths) // 2, num_blocks=256, async_scheduling=on
        )
        prompts = random_prompts(llm.engine.config.vocab_size, list(lengths))
        params = [SamplingParams(temperature=0, max_tokens=new + 3 * i, ignore_eos=True) for i in range(len(prompts))]
        outputs = llm.generate(prompts, params, progress=False)
        chosen[name] = [output.outputs[0].token_ids for output in outputs]
    for i, (a, b) in enumerate(zip(*chosen.values(), strict=True)):
        if a != b:
            place = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise CheckFailed(f"one step ahead chooses other tokens: sequence {i} from its token {place} on")
    return (Figure("tokens alike", sum(map(len, chosen["one ahead"])), "tokens"),)


def busy(options: Options) -> tuple[Figure, ...]:
    """Share of decode steps in which a kernel runs, with and without a step ahead, and tokens/s, in turns."""
    figures: list[Figure] = []
    ahead: list[float] = []
    batches = BATCHES[: options.size(len(BATCHES), 1)]
    new = options.size(STEPS, 4)
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        settings: dict[str, Any] = {"dtype": "bfloat16", "device": options.device, "max_num_seqs": max(batches)}
        settings |= {"num_blocks": max(batches) * 32, "max_model_len": 512}
        llms = {name: LLM(str(directory), async_scheduling=on, **settings) for name, on in LOOPS.items()}
    for batch in batches:
        prompts = random_prompts(llms["one ahead"].engine.config.vocab_size, [options.size(PROMPT, 8)] * batch)
        subjects = {name: partial(workloads.run_ours, llm, prompts, new) for name, llm in llms.items()}
        runs = in_turns(subjects, options.rounds, options.console)
        row = f"batch {batch}"
        steps = {name: [run.per_step for run in done] for name, done in runs.items()}
        for name, values in steps.items():
            shares = [100 * busy_share(llms[name], prompts, new) for _ in range(options.rounds)]
            figures.append(figure(f"{row}/{name}, busy", shares, "%", "profiled"))
            ahead += [statistics.median(shares)] if name == "one ahead" else []
            figures.append(figure(f"{row}/{name}", [batch / s for s in values], "tokens/s"))
        figures.append(ratio(f"{row}/speedup", steps["one after the other"], steps["one ahead"]))
    return (*figures, Figure("busy", min(ahead), "%", note="one ahead, the least busy batch"))


def busy_share(llm: LLM, prompts: list[list[int]], steps: int) -> float:
    """Time in which at least one kernel ran, over the time from the first to the last, in `steps` decode steps.

    On a CPU: time inside torch's operators.
    """
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=2 * steps + 8, ignore_eos=True)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    try:
        for _ in range(steps // 2 + 2):  # prompts, and the first decodes
            engine.step()
        with profile(activities=activities) as trace:
            for _ in range(steps):
                engine.step()
    finally:
        for request in requests:
            engine.abort(request)
        while engine.has_unfinished():  # the step that is on its way
            engine.step()
    kind = "DeviceType.CUDA" if on_gpu else "DeviceType.CPU"
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if str(event.device_type) == kind and not event.is_user_annotation
    ]
    return covered(spans)


def covered(spans: Iterable[Interval]) -> float:
    """Share of the time from the first begin to the last end that at least one interval covers."""
    ordered = sorted(spans)
    if not ordered:
        return 0.0
    begin, end = ordered[0]
    first, inside = begin, 0.0
    for start, stop in ordered[1:]:
        if start > end:
            inside += end - begin
            begin = start
        end = max(end, stop)
    return (inside + end - begin) / (end - first) if end > first else 1.0


def decode(options: Options) -> tuple[Figure, ...]:
    """Bytes/s that decode steps of one sequence read, and their share of the read bandwidth around them."""
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        llm = LLM(str(directory), dtype="bfloat16", device=options.device, max_num_seqs=1, num_blocks=64,
                  max_model_len=512)  # fmt: skip
    found = decode_shares(llm, options.size(2 * options.rounds, 1))
    return (
        figure("bytes read", [read / 1e9 for read in found.read], "GB/s"),
        figure("read bandwidth", [rate / 1e9 for rate in found.bandwidth], "GB/s"),
        figure(
            "share of the bandwidth",
            [100 * share for share in found.shares],
            "%",
            f"{found.skipped} rounds were not steady",
        ),
    )
