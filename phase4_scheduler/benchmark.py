"""Phase 4 against its framework, vLLM and the machine: `python -m phase4_scheduler.benchmark [case ...]`.

    scheduler_speed   steps/s of the scheduler alone, with 64, 256 and 1,024 sequences
    policies          waiting by policy near saturation, and with static batches, on a simulated clock
    async_steps       how busy a device is with Python between its steps, one after the other and one ahead
    chunking          gaps between tokens while long prompts come; static and continuous batches (titan-tiny)
    cpu_step          a step of the 1.1B shape by torch's operators and by the CPU kernels
    null_serving      64 streams over HTTP of an engine without a model: tokens/s, and what a token comes late
    http_overhead     the first token over HTTP beside the first of AsyncLLM
    startup           from `titan serve` to listening and to ready; `titan --help`
    chaos             2,000 requests, clients that leave, an engine that is killed, a signal at the end: what is lost
    drift             memory of both processes over 10,000 requests
    serving_vllm      output tokens/s of the 1.1B shape over HTTP, beside vLLM's server
    busy              share of decode steps in which a kernel runs
    decode            share of the read bandwidth that decoding one sequence reaches
    random            256 requests of random lengths over HTTP, and other loads, beside vLLM where there is one
    check_ahead       what must be right on a GPU before it is timed

The last four need a GPU. Every case times its subjects in turns (A B A B), several rounds, and writes
reports/results/phase4/<case>.json; servers that are compared are up at once, and who is not measured is halted. The
ratios are medians of ratios within a round. vLLM comes from an environment of its own: measures/vllm_peer.py says how
to build it. `--dry-run` goes through the GPU cases with tiny sizes on the CPU.
"""

from __future__ import annotations

import importlib

from module0_profiling import rooms
from module0_profiling.bench import Case, Options, Suite, main
from module0_profiling.bench_gpu import GpuCase
from module0_profiling.results import Figure
from phase0_prototype.hub import resolve_model
from phase0_prototype.workloads import SHAPE, TINY

ROOM = __package__ or "phase4_scheduler"


def lazily(module: str, function: str) -> Case:
    """A case of another module, which is imported when the case runs."""

    def case(options: Options) -> tuple[Figure, ...]:
        found: Case = getattr(importlib.import_module(f"{ROOM}.measures.{module}"), function)
        return found(options)

    return case


def check_ahead(options: Options) -> tuple[Figure, ...]:
    """One step ahead chooses the tokens of one after the other."""
    from phase4_scheduler.measures import gpu_cases

    return gpu_cases.check_ahead(options.device, dry=options.dry)


CASES: dict[str, Case] = {
    "scheduler_speed": lazily("scheduling_cases", "scheduler_speed"),
    "policies": lazily("scheduling_cases", "policies"),
    "async_steps": lazily("scheduling_cases", "async_steps"),
    "chunking": lazily("engine_cases", "chunking"),
    "cpu_step": lazily("cpu_step_cases", "cpu_step"),
    "null_serving": lazily("front_cases", "null_serving"),
    "http_overhead": lazily("front_cases", "http_overhead"),
    "startup": lazily("serving_cases", "startup"),
    "chaos": lazily("chaos_cases", "chaos"),
    "drift": lazily("chaos_cases", "drift"),
    "serving_vllm": lazily("serving_cases", "serving_vllm"),
    "busy": lazily("gpu_cases", "busy"),
    "decode": lazily("gpu_cases", "decode"),
    "random": lazily("serving_cases", "random_lengths"),
    "check_ahead": check_ahead,
}
GPU_CHECKS = (GpuCase("check_ahead", value=10, seconds=40),)
GPU_CASES = (
    GpuCase("random", value=10, seconds=300, check="check_ahead"),
    GpuCase("busy", value=9, seconds=90, check="check_ahead"),
    GpuCase("decode", value=8, seconds=60, check="check_ahead"),
    GpuCase("startup", value=6, seconds=120),
    GpuCase("chunking", value=5, seconds=60, check="check_ahead"),
)
NEEDS_GPU = ("busy", "decode", "random", "check_ahead")

FRONT = ("uvicorn", "fastapi", "msgspec", "pyzmq", "uvloop", "httptools")  # vLLM's version is in a note of its figures

SUITE = Suite(
    room=ROOM,
    cases=CASES,
    needs_gpu=NEEDS_GPU,
    gpu=[case.name for case in (*GPU_CHECKS, *GPU_CASES)],
    peers=dict.fromkeys(("serving_vllm", "random", "null_serving", "http_overhead", "startup"), FRONT),
    checkpoint=rooms.ROOT / "build" / SHAPE,
    tiny=lambda: resolve_model(TINY),  # it stands for the 1.1B shape too
)

if __name__ == "__main__":
    main(SUITE, __doc__)
