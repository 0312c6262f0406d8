"""What a step of this engine costs beside its operations, for `titan predict`: measured on models of width 64.

Such a model has next to nothing to compute, so that its step is Python, operator calls, sampling and text. Two depths
separate what each layer costs from what a step costs, two batches what each sequence adds. The little work that there
is, is predicted with the machine's rates and taken off.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from module0_profiling.calibration import Calibration
from module0_profiling.device import Device
from module0_profiling.engine_overhead import Overhead
from module0_profiling.model_costs import Formats
from module0_profiling.model_shape import load_shape
from module0_profiling.predict import Measured, predict
from phase0_prototype import workloads
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.llm import LLM

LAYERS, BATCHES = (2, 10), (1, 8)
PROMPT, NEW_TOKENS, ROUNDS = 16, 24, 7


def measure(device: Device, rates: Calibration, engine: type[LLM] = LLM) -> Overhead:
    """Overhead of a decode step with the runner that the engine chooses here; takes about 2 s on a CPU.

    `engine` is the `LLM` of the phase that is measured.
    """
    machine, formats = Measured(rates, ridge=1.0, cached=True), Formats(rates.dtype)
    rest: dict[tuple[int, int], float] = {}
    with TemporaryDirectory(prefix="titan-overhead-") as folder:
        for layers in LAYERS:
            path = write_checkpoint(narrow(layers), Path(folder) / str(layers), dtype=rates.dtype)
            llm = engine(str(path), device=device.torch_name, dtype=rates.dtype, max_num_seqs=max(BATCHES))
            for batch in BATCHES:
                context = PROMPT + NEW_TOKENS // 2
                work = predict(load_shape(narrow(layers)), machine, batch, context, formats=formats).seconds
                rest[layers, batch] = max(0.0, seconds(llm, batch) - work)
    (few, many), (one, all_) = LAYERS, BATCHES
    layer = max(0.0, (rest[many, one] - rest[few, one]) / (many - few))
    sequence = max(0.0, (rest[few, all_] - rest[few, one]) / (all_ - one))
    return Overhead(layer, max(0.0, rest[few, one] - few * layer - one * sequence), sequence)


def seconds(llm: LLM, batch: int) -> float:
    """Median of the seconds of a decode step."""
    prompts = workloads.random_prompts(llm.engine.config.vocab_size, [PROMPT] * batch)
    runs = [workloads.run_ours(llm, prompts, NEW_TOKENS) for _ in range(ROUNDS + 1)]
    return statistics.median(run.per_step for run in runs[1:])


def narrow(layers: int) -> dict[str, Any]:
    """The config.json of a Llama with next to nothing to compute."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
