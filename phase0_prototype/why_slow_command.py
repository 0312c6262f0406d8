"""`titan why-slow`: runs a workload on the engine and says in words what bounds it and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from module0_profiling.why_slow import Verdict


def why_slow(
    model: Annotated[str, typer.Option(help="Directory, shipped name or hub id.")] = "titan-tiny",
    use: Annotated[str, typer.Option(help="Which parts run, as in phase0=mine or phase0=framework.")] = "",
    phase: Annotated[str, typer.Option(help="Whose engine runs, as in phase0; by default the newest.")] = "",
    runner: Annotated[str, typer.Option(help="eager, compile, cuda-graph or auto.")] = "auto",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    prompt_length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or auto.")] = "auto",
) -> None:
    """What bounds generation here (memory, arithmetic, operator calls, recomputation) and the three things to try."""
    import os

    from rich.console import Console

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
    from module0_profiling.course.parts import Use, describe
    from module0_profiling.why_slow import diagnose
    from phase0_prototype.engines import llm_of
    from phase0_prototype.why_slow_run import collect

    notes = Console(stderr=True, highlight=False)
    chosen = Use.parse(use)
    with notes.status(f"loading {model}"):
        llm = llm_of(phase)(model, device=device, dtype=dtype, runner=runner, max_num_seqs=max(1, batch), use=chosen)
    notes.print(describe(chosen), style="dim")
    with notes.status("measuring"):
        evidence = collect(llm, batch=batch, prompt_length=prompt_length, tokens=tokens)
    report = Console(highlight=False)
    rate = evidence.sequences / evidence.step
    report.print(f"{evidence.subject}, {evidence.runner}: {rate:,.0f} tokens/s", markup=False)
    report.print(text(diagnose(evidence)), markup=False)


def text(verdict: Verdict) -> str:
    """A verdict as lines: the headline, what was found, and a numbered list of things to try."""
    lines = [f"It is {verdict.headline}", "", *(f"  {finding}" for finding in verdict.findings), ""]
    if verdict.advices:
        lines.append("Try, the first first:")
    else:
        lines.append("Nothing that the cost model knows would gain more than noise.")
    for i, advice in enumerate(verdict.advices, start=1):
        lines.append(f"  {i}. {advice.what}: {advice.why}: up to {advice.gain:.1f}x")
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    """Add the command to `titan`."""
    app.command("why-slow")(why_slow)
