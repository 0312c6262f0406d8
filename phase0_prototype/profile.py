"""Where a decode step's time goes: the slowest operations and how much of the step is operations at all.

The rest of a step is Python: scheduling, building the batch, dispatch, sampling, text. On a GPU, "busy" is the time in
kernels over the wall time; on a CPU it is the time inside torch's operators.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from module0_profiling.results import Figure
from phase0_prototype import workloads
from phase0_prototype.llm import LLM
from phase0_prototype.sampling_params import SamplingParams

STEPS = 48
CONTEXT = 64


@dataclass(frozen=True)
class OperationTime:
    """One operation of a decode step: its name, seconds a step in itself, calls a step."""

    name: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class StepProfile:
    """A decode step: wall seconds without the profiler and with it, and its operations, slowest first.

    `forward` is the share of the profiled wall time inside the range of that name, the model's forward pass.
    """

    wall: float
    profiled_wall: float
    operations: tuple[OperationTime, ...]
    forward: float

    @property
    def busy(self) -> float:
        """Share of the profiled wall time that is inside operations, 0..1."""
        return sum(op.seconds for op in self.operations) / self.profiled_wall


def profile_decode(llm: LLM, *, context: int = CONTEXT, steps: int = STEPS, batch: int = 1) -> StepProfile:
    """Profile decode steps.

    Args:
        llm: any model; nothing else runs in it.
        context: tokens of each prompt.
        steps: decode steps profiled, after as many for warming up and as many timed without the profiler.
        batch: sequences.
    """
    device = llm.engine.device
    prompts = workloads.random_prompts(llm.engine.config.vocab_size, [context] * batch)
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=3 * steps + 2, ignore_eos=True)
    requests = [engine.add_request(prompt, params) for prompt in prompts]

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        return (time.perf_counter() - began) / steps

    try:
        engine.step()  # the prompts
        run()
        wall = run()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as trace:
            profiled = run()
    finally:
        for request in requests:
            engine.abort(request)
    found, forward = [], 0.0
    for event in trace.key_averages():
        if event.is_user_annotation:  # a range of ours: what is inside counts, not the range
            forward += event.cpu_time_total / 1e6 / steps if event.key == "forward" else 0.0
            continue
        micros = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if micros and not event.key.startswith(("cuda", "ProfilerStep", "USDT")):
            found.append(OperationTime(event.key, micros / 1e6 / steps, event.count / steps))
    return StepProfile(wall, profiled, tuple(sorted(found, key=lambda op: -op.seconds)), forward / profiled)


def decode_profile(device: str, model: str = "titan-tiny") -> tuple[Figure, ...]:
    """Profiles of framework and solution as figures for the report."""
    figures: list[Figure] = []
    for use in ("framework", "solution"):
        measured = profile_decode(LLM(model, device=device, max_num_seqs=1, use=f"phase0={use}"))
        figures += [
            Figure(f"{use}/step", measured.wall * 1e3, "ms", note=f"decode at a context of {CONTEXT + 2 * STEPS}"),
            Figure(f"{use}/busy", 100 * measured.busy, "%", note="time inside operations, both with the profiler on"),
            Figure(f"{use}/operations", sum(op.calls for op in measured.operations), "calls"),
        ]
        total = sum(op.seconds for op in measured.operations)
        figures += [
            Figure(f"{use}, slowest/{i}. {op.name}", 100 * op.seconds / total, "%", note=f"{op.calls:.0f} calls a step")
            for i, op in enumerate(measured.operations[:3], start=1)
        ]
    return tuple(figures)


def trace_file(llm: LLM, path: str, *, steps: int = 8) -> str:
    """Write a timeline of decode steps that chrome://tracing and Perfetto open; returns the path."""
    engine = llm.engine
    prompt = workloads.random_prompts(llm.engine.config.vocab_size, [CONTEXT])[0]
    request = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=steps + 4, ignore_eos=True))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    try:
        engine.step()
        engine.step()
        with profile(activities=activities) as trace:
            for _ in range(steps):
                engine.step()
    finally:
        engine.abort(request)
    trace.export_chrome_trace(path)
    return path
