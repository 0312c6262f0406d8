"""Benchmark cases with whole servers: ours beside vLLM, and how long a start takes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from module0_profiling import rooms
from module0_profiling.bench import Options, figure
from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.hardware import detect, measured_peaks
from module0_profiling.results import Figure
from phase0_prototype import workloads
from phase0_prototype.workloads import SHAPE, TINY
from phase4_scheduler.bench.workloads import fixed, mixed, random
from phase4_scheduler.measures import our_server, vllm_peer
from phase4_scheduler.measures.loads import Load, compare
from phase4_scheduler.measures.our_server import NULL, serving_settings, titan
from phase4_scheduler.measures.servers import Launch, Server, free_port

CPU_LOADS = (
    Load("1 at a time", partial(fixed, 3, prompt=128, output=32), 1),
    Load("8 at a time", partial(fixed, 16, prompt=128, output=32), 8),
    Load("32 at a time", partial(fixed, 32, prompt=128, output=32), 32),
    Load("short and long, 16 at a time", partial(mixed, 32, prompt=128), 16),
)
GPU_LOADS = (
    Load("1 at a time", partial(fixed, 4, prompt=128, output=128), 1),
    Load("short and long, 64 at a time", partial(mixed, 256, prompt=128), 64),
    Load("random lengths, 256 at once", partial(random, 256), 256),
)
DRY_LOADS = (Load("random lengths, 2 at once", partial(random, 3, prompt=(2, 6), output=(1, 4)), 2),)


def serving_vllm(options: Options) -> tuple[Figure, ...]:
    """Output tokens/s over HTTP beside vLLM, and what the machine's memory and units can do.

    Raises:
        CheckFailed: vLLM is not installed, or an answer failed.
    """
    if missing := vllm_peer.why_not():
        raise CheckFailed(missing)
    return (*_beside_vllm(CPU_LOADS, options, max_model_len=1024, max_num_seqs=64), *_limits(options.device))


def random_lengths(options: Options) -> tuple[Figure, ...]:
    """256 requests of random lengths, short and long ones, one at a time; beside vLLM where there is one.

    Raises:
        CheckFailed: an answer failed.
    """
    if options.dry:
        return compare([our_server.launch(TINY, {"device": "cpu", "max_num_seqs": 2})], DRY_LOADS, options)
    return _beside_vllm(GPU_LOADS, options, max_model_len=2048, max_num_seqs=256)


def _beside_vllm(
    loads: Sequence[Load], options: Options, *, max_model_len: int, max_num_seqs: int
) -> tuple[Figure, ...]:
    missing = vllm_peer.why_not()
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        sizes: dict[str, Any] = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
        settings = serving_settings(options.device, **sizes)
        servers = [our_server.launch(str(directory), settings | {"dtype": "bfloat16"})]
        if not missing:
            servers.append(vllm_peer.launch(directory, free_port(), device=options.device, **sizes))
        figures = compare(servers, loads, options)
    return (*figures, Figure("vLLM is there", float(not missing), "", note=missing or vllm_peer.version()))


def _limits(device: str) -> tuple[Figure, ...]:
    """What bounds every engine here: reading the weights once a step, and products of matrices."""
    peaks = measured_peaks(detect(device), refresh=True)
    return (
        Figure("limits/read bandwidth", peaks.read_bandwidth / 1e9, "GB/s"),
        *(Figure(f"limits/{name} products", rate / 1e12, "TFLOP/s") for name, rate in peaks.matmul.items()),
    )


def startup(options: Options) -> tuple[Figure, ...]:
    """Seconds from the start of `titan serve` until it listens (/health) and serves (/ready), and of `titan --help`."""
    figures: list[Figure] = []
    with workloads.random_checkpoint(SHAPE, options.checkpoint) as directory:
        models = {TINY: TINY} if options.dry else {NULL: NULL, TINY: TINY, SHAPE: str(directory)}
        for name, model in models.items():
            settings = {} if model == NULL else {"device": options.device}
            times = [_start(our_server.launch(model, settings)) for _ in range(options.rounds + 1)]
            first, *later = times  # the first may read the weights from the disk
            figures.append(figure(f"{name}/listens", [t[0] for t in later], "s"))
            figures.append(figure(f"{name}/ready", [t[1] for t in later], "s"))
            figures.append(Figure(f"{name}/ready, first time", first[1], "s"))
    for option in ("--help", "--version"):
        seconds = [_run((*titan(), option)) for _ in range(options.rounds)]
        figures.append(figure(f"titan {option}", seconds, "s"))
    return tuple(figures)


def _start(launch: Launch) -> tuple[float, float]:
    with Server(launch) as server:
        return server.wait_until_ready("/health"), server.wait_until_ready()


def _run(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=rooms.ROOT, check=True, capture_output=True)
    return time.perf_counter() - began
