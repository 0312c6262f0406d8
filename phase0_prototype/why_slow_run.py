"""Collects the evidence for `titan why-slow`: runs a workload on the engine, once plainly and a few steps profiled."""

from __future__ import annotations

import statistics
import time

import torch

from module0_profiling import model_costs
from module0_profiling.hardware import detect, measured_peaks
from module0_profiling.model_shape import load_shape
from module0_profiling.why_slow import Evidence
from phase0_prototype import workloads
from phase0_prototype.errors import UserError
from phase0_prototype.hub import resolve_model
from phase0_prototype.llm import LLM
from phase0_prototype.profile import profile_decode

PROFILED_STEPS = 8


def collect(llm: LLM, *, batch: int = 1, prompt_length: int = 8, tokens: int = 64) -> Evidence:
    """Measure a workload of equally long random prompts, greedy, without an end.

    Args:
        llm: the engine; `batch` sequences must fit.
        batch: sequences that are asked for at once.
        prompt_length: tokens of each prompt.
        tokens: to generate for each; at least 2, for the first one belongs to the prompt.

    Raises:
        UserError: the workload does not fit the model.
    """
    engine = llm.engine
    _check(engine.max_model_len, batch, prompt_length, tokens)
    prompts = workloads.random_prompts(engine.config.vocab_size, [prompt_length] * batch)
    runner_name = _runner_name(llm)
    workloads.run_ours(llm, prompts, min(tokens, 4) if runner_name == "eager" else tokens)  # compiles, captures

    runner = engine.runner
    tokens_before, passes_before = runner.forward_tokens, runner.forward_passes
    run = workloads.run_ours(llm, prompts, tokens)
    computed = runner.forward_tokens - tokens_before
    sequences = batch * tokens / (runner.forward_passes - passes_before)
    decode_passes = batch * (tokens - 1) / sequences

    context = prompt_length + tokens // 2
    profiled = profile_decode(llm, context=context, steps=_steps(engine.max_model_len, context), batch=batch)

    device = detect(str(engine.device))
    peaks = measured_peaks(device)
    model, dtype = engine.model, engine.model.kv_spec.dtype
    name = str(dtype).removeprefix("torch.")
    work = model_costs.total(
        model_costs.decode_step(load_shape(resolve_model(llm.config.model)), 1, context, model_costs.Formats(name))
    )
    return Evidence(
        subject=f"{llm.config.model}, {name}, {batch} x {tokens} tokens after {prompt_length} on {device.name}",
        on_gpu=device.kind != "cpu",
        runner=runner_name,
        needed=batch * (prompt_length + tokens - 1),
        computed=computed,
        generated=batch * tokens,
        sequences=sequences,
        rows=(computed - batch * prompt_length) / decode_passes,
        step=run.per_step,
        busy=min(1.0, profiled.busy),
        calls=sum(op.calls for op in profiled.operations),
        call_seconds=seconds_per_call(engine.device, dtype, engine.config.hidden_size),
        forward=min(1.0, profiled.forward),
        weight_bytes=model.weight_bytes,
        weight_bits=8 * dtype.itemsize,
        kv_bytes=sequences * model.kv_spec.bytes_per_token * context,
        flops_per_token=work.flops,
        bandwidth=peaks.read_bandwidth,
        flops=peaks.matmul.get(name) or max(peaks.matmul.values()),
        half_flops=max(peaks.matmul.get("bfloat16", 0.0), peaks.matmul.get("float16", 0.0)),
        cache_bytes=device.cache_bytes if device.kind == "cpu" else 0,
        threads=torch.get_num_threads() if device.kind == "cpu" else 0,
        cores=device.units if device.kind == "cpu" else 0,
    )


def seconds_per_call(device: torch.device, dtype: torch.dtype, size: int, calls: int = 200, rounds: int = 7) -> float:
    """Seconds that a call of an operator costs when it has next to nothing to do: one row plus itself."""
    row = torch.ones(1, size, dtype=dtype, device=device)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    seconds = []
    with torch.inference_mode():
        for _ in range(rounds):
            wait()
            began = time.perf_counter()
            for _ in range(calls):
                row + row
            wait()
            seconds.append((time.perf_counter() - began) / calls)
    return statistics.median(seconds)


def _runner_name(llm: LLM) -> str:
    """The runner that really runs: the framework calls its eager one by all names."""
    kind = type(llm.engine.runner).__name__
    return {"CompiledRunner": "compile", "GraphRunner": "cuda-graph"}.get(kind, "eager")


def _steps(max_model_len: int, context: int) -> int:
    """Profiled steps such that warming up, timing and profiling fit into the context."""
    return max(1, min(PROFILED_STEPS, (max_model_len - context - 2) // 3))


def _check(max_model_len: int, batch: int, prompt_length: int, tokens: int) -> None:
    for name, value, least in (("--batch", batch, 1), ("--prompt-length", prompt_length, 1), ("--tokens", tokens, 2)):
        if value < least:
            raise UserError(f"{name} {value} is too small: give at least {least}")
    longest = prompt_length + max(tokens, tokens // 2 + 5)  # profiling one step at half of the way generates five
    if longest > max_model_len:
        raise UserError(
            f"{prompt_length} + {tokens} tokens are more than max_model_len {max_model_len}: lower --prompt-length or "
            "--tokens"
        )
