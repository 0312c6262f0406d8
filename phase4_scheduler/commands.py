"""The `titan` commands of phase 4: `serve`, `bench` and `top`. What they need is imported when one runs."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

Text = str | None
Number = int | None
Real = float | None


def serve(
    model: Annotated[str, typer.Argument(help="Directory, shipped name, hub id, or null (tokens without a model).")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name in requests; may be given again.")] = None,
    dtype: Annotated[Text, typer.Option(help="bfloat16, float16, float32 or auto.")] = None,
    device: Annotated[Text, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = None,
    max_model_len: Annotated[Number, typer.Option(help="Longest sequence, prompt included.")] = None,
    max_num_seqs: Annotated[Number, typer.Option(help="Sequences that run together.")] = None,
    max_num_batched_tokens: Annotated[Number, typer.Option(help="Tokens of one step.")] = None,
    gpu_memory_utilization: Annotated[Real, typer.Option(help="Share of a GPU's memory to use.")] = None,
    kv_cache_memory_bytes: Annotated[Number, typer.Option(help="Bytes of the KV cache.")] = None,
    block_size: Annotated[Number, typer.Option(help="Tokens of a KV block.")] = None,
    kv_cache_dtype: Annotated[Text, typer.Option(help="Number format of the KV cache.")] = None,
    attention_backend: Annotated[Text, typer.Option(help="cpu, triton, flashinfer, torch, mine or auto.")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    seed: Annotated[Number, typer.Option(help="Random choices of requests without one derive from it.")] = None,
    scheduling_policy: Annotated[str, typer.Option(help="fcfs, priority, sjf or ageing.")] = "fcfs",
    ageing_rate: Annotated[Real, typer.Option(help="ageing: tokens that a second of waiting is worth.")] = None,
    enable_chunked_prefill: Annotated[bool | None, typer.Option(help="Compute prompts in pieces.")] = None,
    long_prefill_token_threshold: Annotated[Number, typer.Option(help="Most tokens of one prompt in a step.")] = None,
    step_priority: Annotated[Text, typer.Option(help="What a step takes first: decode or prefill.")] = None,
    batch_size: Annotated[Number, typer.Option(help="Dynamic batching: requests that an idle engine awaits.")] = None,
    batch_wait: Annotated[Real, typer.Option(help="Dynamic batching: seconds that it waits at most.")] = None,
    preemption: Annotated[Text, typer.Option(help="Without free blocks: recompute, swap or reject.")] = None,
    async_scheduling: Annotated[bool | None, typer.Option(help="Schedule the next step while one runs.")] = None,
    settings: Annotated[str, typer.Option(help="More settings of the engine as JSON.")] = "{}",
    use: Annotated[str, typer.Option(help="Which parts run, as in phase4=mine.")] = "",
    api_key: Annotated[list[str] | None, typer.Option(envvar="TITAN_API_KEY", help="May be given again.")] = None,
    max_num_queued_reqs: Annotated[int, typer.Option(help="Sequences that may wait; -1: any number.")] = 4096,
    max_num_queued_tokens: Annotated[int, typer.Option(help="Prompt tokens that may wait; -1: any number.")] = -1,
    max_logprobs: Annotated[int, typer.Option(min=-1, help="Largest logprobs of a request; -1: any.")] = 20,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest body of a request.")] = 16 << 20,
    stream_timeout: Annotated[float, typer.Option(min=1, help="Seconds that a client may take nothing.")] = 60.0,
    sse_keep_alive_interval: Annotated[float, typer.Option(min=0, help="Seconds between comments; 0: none.")] = 0.0,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file, in place of the checkpoint's.")] = None,
    generation_config: Annotated[str, typer.Option(help="Sampling defaults: auto (the checkpoint's), vllm.")] = "auto",
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish in after SIGTERM.")] = 30.0,
    hang_timeout: Annotated[float, typer.Option(min=1, help="Seconds of silence of a healthy engine.")] = 30.0,
    log_interval: Annotated[float, typer.Option(min=0, help="Seconds between lines of statistics; 0: none.")] = 10.0,
) -> None:
    """Serve a model over HTTP, as OpenAI's and Anthropic's clients expect it."""
    from phase0_prototype.commands import json_option
    from phase4_scheduler.server import serve as server

    engine = {
        "dtype": dtype,
        "device": device,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "block_size": block_size,
        "kv_cache_dtype": kv_cache_dtype,
        "attention_backend": attention_backend,
        "runner": "eager" if enforce_eager else None,
        "seed": seed,
        "scheduling_policy": scheduling_policy,
        "ageing_rate": ageing_rate,
        "enable_chunked_prefill": enable_chunked_prefill,
        "long_prefill_token_threshold": long_prefill_token_threshold,
        "step_priority": step_priority,
        "batch_size": batch_size,
        "batch_wait": batch_wait,
        "preemption": preemption,
        "async_scheduling": {None: None, True: "on", False: "off"}[async_scheduling],
    }
    given = {name: value for name, value in engine.items() if value is not None}
    options = server.ServerOptions(
        served_names=tuple(served_model_name or ()),
        api_keys=tuple(api_key or ()),
        max_body_bytes=max_body_bytes,
        max_logprobs=max_logprobs,
        max_num_queued_reqs=None if max_num_queued_reqs < 0 else max_num_queued_reqs,
        max_num_queued_tokens=None if max_num_queued_tokens < 0 else max_num_queued_tokens,
        stream_timeout=stream_timeout,
        keep_alive=sse_keep_alive_interval,
        chat_template=chat_template,
        scheduling_policy=scheduling_policy,
        log_interval=log_interval,
        generation_config=generation_config,
    )
    if warning := server.warn_if_open(host, options.api_keys):
        typer.echo(warning, err=True)
    server.serve(
        server.ServeConfig(
            model,
            host,
            port,
            given | json_option("--settings", settings, '{"swap_bytes": 0}'),
            use,
            options,
            server.Supervision(hang_timeout=hang_timeout),
            shutdown_timeout,
        )
    )


def register(app: typer.Typer) -> None:
    """Add the commands to `titan`."""
    app.command()(serve)
    for name in ("phase4_scheduler.bench.commands", "phase4_scheduler.top"):
        if importlib.util.find_spec(name):
            importlib.import_module(name).register(app)
