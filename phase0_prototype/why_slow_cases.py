"""What `titan why-slow` says of the framework, the solution and a large model, as figures for module 0's report."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from module0_profiling.results import Figure
from module0_profiling.why_slow import Evidence, diagnose, parts
from phase0_prototype import workloads
from phase0_prototype.llm import LLM
from phase0_prototype.why_slow_run import collect


def figures(name: str, evidence: Evidence) -> list[Figure]:
    """One row; its name says the bound that the verdict names."""
    found, row = parts(evidence), f"{name}: {diagnose(evidence).bound}"
    return [
        Figure(f"{row}/tokens computed for each needed", evidence.waste, ""),
        Figure(f"{row}/step", evidence.step * 1e3, "ms"),
        Figure(f"{row}/memory at least", found.memory * 1e3, "ms"),
        Figure(f"{row}/arithmetic at least", found.arithmetic * 1e3, "ms"),
        Figure(f"{row}/operator calls", found.overhead * 1e3, "ms"),
    ]


def three(large: Path, device: str, tokens: int, console: Console) -> tuple[Figure, ...]:
    """The framework, the solution and the checkpoint in `large`, each generating so many tokens."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
    found: list[Figure] = []
    for name, model, use in (
        ("framework, titan-tiny", workloads.TINY, "phase0=framework"),
        ("titan-tiny", workloads.TINY, ""),
        ("the 1.1B shape", str(large), ""),
    ):
        with console.status(name):
            llm = LLM(model, device=device, dtype="bfloat16", runner="eager", max_num_seqs=1, use=use)
            evidence = collect(llm, tokens=tokens)
        console.print(f"{name}: {diagnose(evidence).headline}", highlight=False)
        found += figures(name, evidence)
    return tuple(found)
