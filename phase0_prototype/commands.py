"""The `titan` commands of phase 0: `generate`, `demo`, `why-slow`, `checkpoint`. Torch is imported when one runs."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from phase0_prototype.sampling_params import SamplingParams

DEMO_PROMPTS = ("def binary_search(", 'class Queue:\n    """')


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    model: Annotated[str, typer.Option(help="Directory, shipped name or hub id.")] = "titan-tiny",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages what was said.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fix the random choices.")] = None,
    params: Annotated[str, typer.Option(help="More sampling parameters as JSON.")] = "{}",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
    runner: Annotated[str, typer.Option(help="eager, compile, cuda-graph or auto.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, prompt included.")] = None,
    use: Annotated[str, typer.Option(help="Which parts run, as in phase0=mine or phase0=framework.")] = "",
    phase: Annotated[str, typer.Option(help="Whose engine runs, as in phase0; by default the newest.")] = "",
    attention_backend: Annotated[
        str, typer.Option(help="triton, flashinfer, torch, mine or auto (titan doctor says why): from phase 3 on.")
    ] = "",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="fp8_e4m3, fp8_e5m2, fp8_per_token_head, fp8_ds_mla or auto: phase 3 on.")
    ] = "",
    settings: Annotated[str, typer.Option(help="More settings of the engine as JSON.")] = "{}",
    beside: Annotated[bool, typer.Option(help="Measure the engine of the phase before, too.")] = False,
) -> None:
    """Generate text, streaming, and print tokens/s and the share of the memory bandwidth."""
    import sys

    from phase0_prototype.errors import UserError
    from phase0_prototype.sampling_params import SamplingParams

    more = json_option("--params", params, '{"n": 1}')
    engine = {"dtype": dtype, "device": device, "runner": runner, "max_model_len": max_model_len}
    later = {"attention_backend": attention_backend, "kv_cache_dtype": kv_cache_dtype}
    engine |= {name: value for name, value in later.items() if value}
    engine |= json_option("--settings", settings, '{"max_num_seqs": 4}')
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or [],
        "seed": seed,
    }
    wanted = SamplingParams.from_dict({**given, **more})
    if wanted.n != 1:
        raise UserError(f"n={wanted.n} can't be streamed to a terminal: use the Python API for several outputs")
    text = sys.stdin.read() if prompt == "-" else prompt
    run([text], wanted, model, engine, use, phase, beside)


def demo() -> None:
    """Continue a few prompts with the model that the project trained itself."""
    from phase0_prototype.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=3, max_tokens=140, stop=["\n\n\n"])
    run(list(DEMO_PROMPTS), params, "titan-tiny")


def run(
    prompts: list[str],
    params: SamplingParams,
    model: str,
    settings: dict[str, Any] | None = None,
    use: str = "",
    phase: str = "",
    beside: bool = False,
) -> None:
    """Stream each prompt through an engine and print a summary of the last.

    Args:
        prompts: texts.
        params: for all of them.
        model, settings: see the phase's `LLM`.
        use: which parts run.
        phase: whose engine; "": the newest.
        beside: print the speed of the phase before, too.
    """
    from rich.console import Console

    from module0_profiling.course.parts import Use, describe
    from phase0_prototype import console, engines
    from phase0_prototype.cpu_memory import keep_freed_memory

    notes = Console(stderr=True, highlight=False)
    chosen = Use.parse(use)
    with notes.status(f"loading {model}"):
        llm = engines.llm_of(phase)(model, use=chosen, **settings or {})
    keep_freed_memory()
    notes.print(describe(chosen), style="dim")
    for prompt in prompts:
        speed = console.stream(llm, prompt, params)
        notes.print()
    with notes.status("measuring this machine's memory bandwidth"):
        said = console.summary(llm, speed)
    notes.print(said, style="bold")
    if beside and (older := engines.before(phase)):
        with notes.status(f"measuring {older}"):
            known = {f.name for f in fields(engines.llm_of(older).config_type)}
            shared = {name: value for name, value in (settings or {}).items() if name in known}
            former = engines.llm_of(older)(model, use=chosen, **shared)
            said = console.side_by_side({older: former, phase: llm}, prompts[-1], params)
        notes.print(said, style="bold")


def json_option(option: str, text: str, example: str) -> dict[str, Any]:
    """The JSON object that an option was given; UserError where it is none, with an example of one."""
    from phase0_prototype.errors import UserError

    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option} {text!r} is not JSON ({error.msg}): write {option} '{example}'") from None
    if not isinstance(found, dict):
        raise UserError(f"{option} {text!r} is not a JSON object: write {option} '{example}'")
    return found


def register(app: typer.Typer) -> None:
    """Add the commands to `titan`."""
    from phase0_prototype import checkpoint_commands, why_slow_command

    app.command()(generate)
    app.command()(demo)
    why_slow_command.register(app)
    checkpoint_commands.register(app)
