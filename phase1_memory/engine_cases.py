"""Benchmark cases of the engine with a paged cache: beside phase 0, beside transformers, and under pressure."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.results import Figure
from phase0_prototype import workloads
from phase0_prototype.llm import LLM as PrototypeLLM
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import SHAPE, TINY, Run, in_turns, random_prompts
from phase1_memory.beam_search import BeamSearchParams
from phase1_memory.llm import LLM

PAGE = 16


def decode(options: Options) -> tuple[Figure, ...]:
    """A decode step of the 1.1B shape, contexts of different lengths: one piece (phase 0) and blocks, with peers."""
    figures: list[Figure] = []
    longest = options.size(1152, 64)
    settings: dict[str, Any] = {"dtype": "bfloat16", "device": options.device, "max_model_len": longest}
    cases = [(1, 128, 24), (8, 128, 16), (4, 1024, 8)]  # on a CPU, the prompts take the time
    if options.device.startswith("cuda"):
        cases = [(1, 128, 64), (8, 128, 64), (32, 128, 64), (32, 1024, 64)]
    if options.dry:
        cases = [(1, 8, 2), (2, 8, 2)]
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        engines: dict[str, PrototypeLLM] = {
            "phase 0": PrototypeLLM(str(directory), max_num_seqs=32, **settings),
            "phase 1": LLM(str(directory), num_blocks=32 * -(-longest // PAGE), max_num_seqs=32, **settings),
        }
        peer = workloads.load_transformers(directory, torch.bfloat16, options.device)
    for batch, length, new in cases:
        prompts = random_prompts(engines["phase 0"].engine.config.vocab_size, [length] * batch)
        subjects = {name: partial(workloads.run_ours, llm, prompts, new) for name, llm in engines.items()}
        if length < 1024:
            subjects["transformers"] = partial(workloads.run_transformers, peer, prompts, new)
        runs = in_turns(subjects, options.rounds, options.console)
        row = f"batch {batch}, {length} tokens"
        steps = {name: [run.per_step for run in done] for name, done in runs.items()}
        for name, values in steps.items():
            figures.append(figure(f"{row}/{name}", [batch / s for s in values], "tokens/s"))
            if name != "phase 1":
                figures.append(ratio(f"{row}/over {name}", values, steps["phase 1"]))
    return tuple(figures)


def same_memory(options: Options) -> tuple[Figure, ...]:
    """48 requests in memory that holds four sequences of full length, titan-tiny."""
    old = PrototypeLLM(TINY, device=options.device, max_num_seqs=4, runner="eager")
    new = LLM(TINY, device=options.device, num_blocks=4 * old.engine.max_model_len // PAGE, runner="eager")
    count, tokens = options.size(48, 4), options.size(32, 2)
    prompts = random_prompts(old.engine.config.vocab_size, [16 + i for i in range(count)])
    subjects = {
        "phase 0": partial(workloads.run_ours, old, prompts, tokens),
        "phase 1": partial(workloads.run_ours, new, prompts, tokens),
    }
    passes = {name: llm.engine.runner.forward_passes for name, llm in (("phase 0", old), ("phase 1", new))}
    runs = in_turns(subjects, options.rounds, options.console)
    seconds = {name: [run.prefill + run.decode for run in done] for name, done in runs.items()}
    figures = [figure(name, [count * tokens / s for s in values], "tokens/s") for name, values in seconds.items()]
    for name, llm in (("phase 0", old), ("phase 1", new)):
        per_run = (llm.engine.runner.forward_passes - passes[name]) / (options.rounds + 1)
        figures.append(Figure(f"{name}, forward passes", per_run, ""))
    return (*figures, ratio("speedup", seconds["phase 0"], seconds["phase 1"]))


def pressure(options: Options) -> tuple[Figure, ...]:
    """What it costs to run out of blocks: 24 requests, with plenty, and with a quarter of what they need at once."""
    count, tokens = options.size(24, 4), options.size(96, 8)
    prompts = random_prompts(4096, [32 + 4 * i for i in range(count)])
    need = sum(-(-(len(p) + tokens) // PAGE) for p in prompts)
    scarce = max(need // 4, -(-(len(prompts[-1]) + tokens) // PAGE) + 1)
    limit: dict[str, Any] = {"num_blocks": scarce}
    with tempfile.TemporaryDirectory() as folder:
        file = {"swap_bytes": 0, "offload_dir": folder, "offload_bytes": 1 << 28}
        cases: dict[str, dict[str, Any]] = {
            "plenty": {"num_blocks": 2 * need},
            "recompute": limit,
            "swap to memory": {**limit, "preemption": "swap"},
            "swap to a file": {**limit, "preemption": "swap", **file},
        }
        engines = {name: LLM(TINY, device=options.device, runner="eager", **s) for name, s in cases.items()}
        subjects = {name: partial(workloads.run_ours, llm, prompts, tokens) for name, llm in engines.items()}
        runs = in_turns(subjects, options.rounds, options.console)
        figures: list[Figure] = [Figure("blocks", scarce, ""), Figure("blocks needed at once", need, "")]
        seconds = {name: [run.prefill + run.decode for run in done] for name, done in runs.items()}
        for name, llm in engines.items():
            scheduler, turns = llm.engine.scheduler, options.rounds + 1
            figures.append(figure(f"{name}/speed", [count * tokens / s for s in seconds[name]], "tokens/s"))
            figures.append(Figure(f"{name}/preemptions", scheduler.preemptions / turns, ""))
            figures.append(Figure(f"{name}/recomputed", scheduler.recomputed_tokens / turns, "tokens"))
            if name != "plenty":
                figures.append(ratio(f"{name}/time over plenty", seconds[name], seconds["plenty"]))
        for llm in engines.values():
            if llm.engine.scheduler.store is not None:
                llm.engine.scheduler.store.close()
    return tuple(figures)


def sharing(options: Options) -> tuple[Figure, ...]:
    """Eight continuations of one prompt of titan-tiny; phase 0 computes the prompt eight times."""
    length, tokens = options.size(512, 16), options.size(16, 2)
    engines: dict[str, PrototypeLLM] = {
        "phase 0": PrototypeLLM(TINY, device=options.device, max_num_seqs=8, runner="eager"),
        "phase 1": LLM(TINY, device=options.device, max_num_seqs=8, runner="eager"),
    }
    (prompt,) = random_prompts(4096, [length])
    params = SamplingParams(temperature=1.0, n=8, seed=0, max_tokens=tokens, ignore_eos=True)

    def run(llm: PrototypeLLM) -> Run:
        (output,) = llm.generate(prompt, params, progress=False)
        metrics = output.metrics
        assert metrics is not None and metrics.first_token_time and metrics.finished_time
        first = metrics.first_token_time
        return Run(first - metrics.arrival_time, metrics.finished_time - first, tokens - 1, [])

    before = {name: llm.engine.runner.forward_tokens for name, llm in engines.items()}
    runs = in_turns({name: partial(run, llm) for name, llm in engines.items()}, options.rounds, options.console)
    figures: list[Figure] = []
    for name, llm in engines.items():
        computed = (llm.engine.runner.forward_tokens - before[name]) / (options.rounds + 1)
        figures.append(figure(f"{name}/first token", [1e3 * r.prefill for r in runs[name]], "ms"))
        figures.append(Figure(f"{name}/tokens computed", computed, "tokens"))
    prefills = {name: [r.prefill for r in done] for name, done in runs.items()}
    figures.append(ratio("speedup to the first token", prefills["phase 0"], prefills["phase 1"]))
    return tuple(figures)


def beams(options: Options) -> tuple[Figure, ...]:
    """Beam search of width 4 on titan-tiny beside transformers: the same sequences, and the time."""
    from phase0_prototype.hub import resolve_model

    tokens = options.size(48, 3)
    llm = LLM(TINY, device=options.device, dtype="float32", runner="eager")
    peer = workloads.load_transformers(Path(resolve_model(TINY)), torch.float32, options.device)
    (prompt,) = random_prompts(4096, [options.size(128, 8)])
    params = BeamSearchParams(beam_width=4, max_tokens=tokens, ignore_eos=True)

    def ours() -> Run:
        (output,) = llm.beam_search(prompt, params, progress=False)
        assert output.metrics is not None and output.metrics.latency is not None
        return Run(0.0, output.metrics.latency, tokens, [c.token_ids for c in output.outputs])

    def theirs() -> Run:
        import time

        ids = torch.tensor([prompt], device=peer.device)
        began = time.perf_counter()
        out = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return Run(0.0, time.perf_counter() - began, tokens, out[:, len(prompt) :].tolist())

    runs = in_turns({"ours": ours, "transformers": theirs}, options.rounds, options.console)
    same = sum(a == b for a, b in zip(runs["ours"][0].token_ids, runs["transformers"][0].token_ids, strict=True))
    seconds = {name: [run.decode for run in done] for name, done in runs.items()}
    return (
        *(figure(name, [tokens / s for s in values], "steps/s") for name, values in seconds.items()),
        ratio("speedup", seconds["transformers"], seconds["ours"]),
        Figure("equal sequences of 4", same, ""),
    )
