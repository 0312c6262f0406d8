"""`titan serve` as a server that is measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phase4_scheduler.measures.servers import HOST, Launch, free_port

NULL = "null"  # the engine without a model


def titan() -> Sequence[str]:
    """The command `titan` of this environment."""
    script = Path(sys.executable).with_name("titan")
    if script.is_file():
        return (str(script),)
    return (sys.executable, "-c", "from module0_profiling.cli import main; main()")


def launch(model: str, settings: dict[str, Any] | None = None, *, name: str = "TitanInfer") -> Launch:
    """`titan serve` of a model on a free port.

    Args:
        model: directory, shipped name or "null".
        settings: of the engine.
        name: in figures.
    """
    port = free_port()
    arguments = [
        *titan(), "serve", model, "--host", HOST, "--port", str(port),
        "--served-model-name", "model", "--log-interval", "0", "--settings", json.dumps(settings or {}),
    ]  # fmt: skip
    return Launch(name, arguments, port)


def serving_settings(device: str, *, max_model_len: int, max_num_seqs: int, share: float = 0.4) -> dict[str, Any]:
    """The same sizes as `vllm_peer.launch` gives vLLM."""
    common: dict[str, Any] = {"device": device, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
    if device.startswith("cuda"):
        return common | {"gpu_memory_utilization": share}
    return common | {"kv_cache_memory_bytes": 2 << 30}
