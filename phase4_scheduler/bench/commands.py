"""`titan bench serve | throughput | latency`: load a server, or the engine without one. Imports wait for a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from phase0_prototype.llm import LLM
    from phase4_scheduler.bench.workloads import Workload

WorkloadName = Annotated[
    str, typer.Option("--workload", help="mixed, random, fixed, shared-prefix, sharegpt, or a file of JSON lines.")
]
Count = Annotated[int | None, typer.Option("--num-prompts", help="Requests: by default 64, or all of a file.")]
InputLen = Annotated[int | None, typer.Option(help="Tokens of a prompt; of its own part with a shared prefix.")]
OutputLen = Annotated[int | None, typer.Option(help="Tokens of an answer (fixed, shared-prefix).")]
Short = Annotated[int, typer.Option(help="mixed: tokens of half of the answers.")]
Long = Annotated[int, typer.Option(help="mixed: tokens of the other half.")]
Low = Annotated[int, typer.Option(help="random: least tokens of a prompt and of an answer.")]
High = Annotated[int, typer.Option(help="random: most tokens of a prompt and of an answer.")]
Groups = Annotated[int, typer.Option(help="shared-prefix: different prefixes.")]
PrefixLen = Annotated[int, typer.Option(help="shared-prefix: tokens of each.")]
Longest = Annotated[int | None, typer.Option(help="sharegpt: prompt and answer together at most.")]
Vocab = Annotated[int, typer.Option(help="Token ids of prompts are below this.")]
Seed = Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")]
Out = Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")]
Model = Annotated[str, typer.Option(help="Directory, shipped name or hub id.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32 or auto.")]
DeviceName = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, mps or auto.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, prompt included.")]
Settings = Annotated[str, typer.Option(help="More settings of the engine as JSON.")]
UseParts = Annotated[str, typer.Option("--use", help="Which parts run, as in phase4=mine.")]
Phase = Annotated[str, typer.Option(help="Whose engine runs, as in phase0; by default the newest.")]


def serve(
    base_url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    endpoint: Annotated[str, typer.Option(help="/v1/completions or /v1/chat/completions.")] = "/v1/completions",
    model: Annotated[str, typer.Option(help="Its name there; by default the first that the server lists.")] = "",
    api_key: Annotated[str, typer.Option(envvar="TITAN_API_KEY", help="Sent as bearer token.")] = "",
    workload: WorkloadName = "mixed",
    num_prompts: Count = None,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf: as soon as allowed.")] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson, below: in bursts, above: evener, inf: constant.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests in flight at most: a closed loop.")] = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    short: Short = 10,
    long: Long = 200,
    low: Low = 100,
    high: High = 1024,
    groups: Groups = 8,
    prefix_len: PrefixLen = 256,
    longest: Longest = None,
    vocab_size: Vocab = 1024,
    text: Annotated[bool, typer.Option("--text", help="Prompts of words; always so for a chat.")] = False,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of the full length.")] = True,
    extra_body: Annotated[str, typer.Option(help="More fields of each request as JSON.")] = "{}",
    retry: Annotated[int, typer.Option(help="Send again so often after a 429 or 503.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds for each request.")] = 600.0,
    warmup: Annotated[int, typer.Option(help="Requests before, in no figure.")] = 4,
    slo_ttft: Annotated[float | None, typer.Option(help="In time: seconds to the first token.")] = None,
    slo_itl: Annotated[float | None, typer.Option(help="In time: mean seconds for each further token.")] = None,
    seed: Seed = 0,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Draw times and throughput: the stem of an SVG and a PNG.")] = None,
) -> None:
    """Load any OpenAI-compatible server and say how fast it was. Ctrl-C keeps what has ended."""
    from phase0_prototype.errors import UserError
    from phase4_scheduler.bench.arrivals import Arrival
    from phase4_scheduler.bench.client import CHAT, Target
    from phase4_scheduler.bench.serve_command import run
    from phase4_scheduler.bench.summary import Slo

    fields: dict[str, Any] = {"temperature": 0, **({"ignore_eos": True} if ignore_eos else {})}
    target = Target(
        base_url, model, endpoint, api_key, fields | _object("--extra-body", extra_body), timeout, retries=retry
    )
    arrival, slo = Arrival(request_rate, burstiness, max_concurrency), Slo(slo_ttft, slo_itl)
    if warmup < 0:
        raise UserError(f"--warmup {warmup}: give 0 or more")
    words = text or endpoint == CHAT
    sizes = _sizes(workload, input_len, output_len, short, long, low, high, groups, prefix_len, longest)
    asked = _workload(workload, num_prompts, seed, sizes, vocab_size, text=words)
    before = _workload(workload, warmup, seed + 1, sizes, vocab_size, text=words) if warmup else None
    raise typer.Exit(run(target, asked, arrival, before, seed, slo, out, plot))


def throughput(
    model: Model = "titan-tiny",
    workload: WorkloadName = "mixed",
    num_prompts: Count = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    short: Short = 10,
    long: Long = 200,
    low: Low = 100,
    high: High = 1024,
    groups: Groups = 8,
    prefix_len: PrefixLen = 256,
    longest: Longest = None,
    vocab_size: Vocab = 1024,
    dtype: Dtype = "auto",
    device: DeviceName = "auto",
    max_model_len: MaxModelLen = None,
    settings: Settings = "{}",
    use: UseParts = "",
    phase: Phase = "",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """All requests of a workload at once through the engine, without a server: tokens/s."""
    from phase4_scheduler.bench import offline_commands

    sizes = _sizes(workload, input_len, output_len, short, long, low, high, groups, prefix_len, longest)
    asked = _workload(workload, num_prompts, seed, sizes, vocab_size)
    before = _workload(workload, 2, seed + 1, sizes, vocab_size)
    llm = _llm(model, dtype, device, max_model_len, settings, use, phase)
    offline_commands.throughput(llm, asked, before, out)


def latency(
    model: Model = "titan-tiny",
    batch_size: Annotated[int, typer.Option(help="Sequences.")] = 8,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    iters: Annotated[int, typer.Option(help="Timed rounds.")] = 10,
    warmup_iters: Annotated[int, typer.Option(help="Rounds before.")] = 2,
    vocab_size: Vocab = 1024,
    dtype: Dtype = "auto",
    device: DeviceName = "auto",
    max_model_len: MaxModelLen = None,
    settings: Settings = "{}",
    use: UseParts = "",
    phase: Phase = "",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """One batch again and again, without a server: seconds for the batch and for each token."""
    from phase4_scheduler.bench import offline_commands
    from phase4_scheduler.bench.workloads import PromptMaker

    maker = PromptMaker(seed, vocab=vocab_size)
    llm = _llm(model, dtype, device, max_model_len, settings, use, phase)
    offline_commands.latency(llm, maker, batch_size, input_len, output_len, iters, warmup_iters, out)


def _sizes(
    workload: str,
    input_len: int | None,
    output_len: int | None,
    short: int,
    long: int,
    low: int,
    high: int,
    groups: int,
    prefix_len: int,
    longest: int | None,
) -> dict[str, Any]:
    """The arguments of a workload's function; lengths that were not given are left to its defaults."""
    prompt = {} if input_len is None else {"prompt": input_len}
    output = {} if output_len is None else {"output": output_len}
    known: dict[str, dict[str, Any]] = {
        "mixed": {"short": short, "long": long, **prompt},
        "random": {"prompt": (low, high), "output": (low, high)},
        "fixed": {**prompt, **output},
        "shared-prefix": {"groups": groups, "prefix": prefix_len, **prompt, **output},
        "sharegpt": {"longest": longest},
    }
    return known.get(workload, {})


def _workload(
    name: str, count: int | None, seed: int, sizes: dict[str, Any], vocab: int, *, text: bool = False
) -> Workload:
    from phase0_prototype.errors import UserError
    from phase4_scheduler.bench.workload_file import from_file
    from phase4_scheduler.bench.workloads import MAKERS, PromptMaker

    for option, value in (("--num-prompts", count), *sizes.items()):
        if isinstance(value, int) and value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    maker = PromptMaker(seed, text=text, vocab=vocab)
    if name in MAKERS:
        return MAKERS[name](64 if count is None else count, maker, **sizes)
    if not name.endswith((".jsonl", ".json")) and not Path(name).exists():
        raise UserError(f"--workload {name!r}: choose one of {', '.join(MAKERS)}, or give a file of JSON lines")
    return from_file(Path(name), count, maker)


def _llm(model: str, dtype: str, device: str, max_model_len: int | None, settings: str, use: str, phase: str) -> LLM:
    from rich.console import Console

    from phase0_prototype import engines

    given = {"dtype": dtype, "device": device, "max_model_len": max_model_len}
    with Console(stderr=True).status(f"loading {model}"):
        return engines.llm_of(phase)(model, use=use, **given | _object("--settings", settings))


def _object(option: str, text: str) -> dict[str, Any]:
    import json

    from phase0_prototype.errors import UserError

    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"""{option} {text!r} is not JSON ({error.msg}): write {option} '{{"seed": 1}}'""") from None
    if not isinstance(found, dict):
        raise UserError(f"""{option} {text!r} is not a JSON object: write {option} '{{"seed": 1}}'""")
    return found


def register(app: typer.Typer) -> None:
    """Add `titan bench` with its commands."""
    bench = typer.Typer(help="Load a server, or measure the engine without one.", no_args_is_help=True)
    bench.command()(serve)
    bench.command()(throughput)
    bench.command()(latency)
    app.add_typer(bench, name="bench")
