"""How the engine is set up: one frozen object, checked when it is made, that prints itself."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import psutil
import torch

from module0_profiling.course.needs import absent
from phase0_prototype.config import ModelConfig
from phase0_prototype.errors import UserError
from phase0_prototype.kv_spec import KVSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
DEFAULT_CONTEXT = 8192  # longer contexts reserve memory that most runs never use: ask for them
DEFAULT_SEQS = 32


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; "auto" and None are resolved when the model is known.

    Attributes:
        model: directory, shipped name (`titan-tiny`) or hub id.
        dtype: bfloat16 | float16 | float32 | float64 | auto (what the device computes fast).
        device: cpu | cuda | cuda:N | mps | auto.
        max_model_len: longest sequence, prompt included. None: the model's own limit, at most 8192.
        max_num_seqs: sequences that run together. None: up to 32, as many as fit in half of the free memory.
        max_num_batched_tokens: most prompt tokens in one forward pass.
        runner: eager | compile | cuda-graph | auto (cuda-graph on CUDA, else eager).
        seed: random choices of requests that bring no seed of their own derive from it.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 8192
    runner: str = "auto"
    seed: int = 0

    @classmethod
    def of(cls, model: str, settings: Mapping[str, Any]) -> Self:
        """The config with these settings.

        Raises:
            UserError: a name that is not a setting, with the nearest that is.
        """
        known = [f.name for f in fields(cls) if f.name != "model"]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
                raise UserError(f"{name!r} is not a setting of the engine: {hint}")
        return cls(model, **dict(settings))

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is unknown: choose auto, {', '.join(DTYPES)}")
        if self.runner not in ("auto", "eager", "compile", "cuda-graph"):
            raise UserError(f"runner {self.runner!r} is unknown: choose auto, eager, compile or cuda-graph")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"{name}={value!r} is not allowed: give a positive integer")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed!r} is not allowed: give an integer from 0 to 2**63 - 1")


def resolve_device(name: str) -> torch.device:
    """The device of this name; "auto" takes CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown: choose auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: torch {torch.__version__} sees no CUDA device here (titan doctor says more)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name!r}: Metal is not available here, use cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported: choose auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(name: str, device: torch.device, stored: str | None) -> torch.dtype:
    """The dtype of this name; "auto" takes the stored one unless the device would compute it slowly."""
    if name != "auto":
        return DTYPES[name]
    dtype = DTYPES.get(stored or "bfloat16", torch.bfloat16)
    if device.type == "cpu" and dtype.itemsize == 2:
        capability = torch.backends.cpu.get_cpu_capability()
        fast = torch.cpu._is_avx512_bf16_supported() if capability == "AVX512" else capability == "SVE256"
        return torch.bfloat16 if fast else torch.float32
    return torch.float16 if device.type == "mps" and dtype == torch.bfloat16 else dtype


def resolve_runner(name: str, device: torch.device) -> str:
    """The runner of this name; "auto" is cuda-graph on CUDA and eager elsewhere, where compiling costs the start-up."""
    if name == "cuda-graph" and device.type != "cuda":
        raise UserError(f"runner cuda-graph needs a CUDA device, not {device.type}: use eager or compile")
    if name == "compile" and device.type == "cpu" and (reason := absent("compiler")):
        raise UserError(f"runner compile {reason}: install g++ or clang++, or use eager")
    return ("cuda-graph" if device.type == "cuda" else "eager") if name == "auto" else name


def resolve_lengths(
    config: EngineConfig, model: ModelConfig, spec: KVSpec, weight_bytes: int, device: torch.device
) -> tuple[int, int]:
    """max_model_len and max_num_seqs such that the cache fits in the free memory.

    Raises:
        UserError: what was asked for does not fit, with the numbers.
    """
    limit = model.longest
    length = config.max_model_len or min(limit, DEFAULT_CONTEXT)
    if length > limit:
        raise UserError(f"max_model_len {length} is more than the model's {limit} positions: lower it")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # the weights are allocated by now, but no page of them has been touched
        free = psutil.virtual_memory().available - weight_bytes
        if free < 0:
            raise UserError(
                f"{config.model} needs {weight_bytes / 1e9:.1f} GB for its weights, "
                f"{(free + weight_bytes) / 1e9:.1f} GB of memory are free: choose a smaller model or free some"
            )
    row = spec.bytes_per_token * length
    seqs = config.max_num_seqs or max(1, min(DEFAULT_SEQS, math.floor(free / 2 / row)))
    if row * seqs > free * 0.9:
        raise UserError(
            f"max_model_len {length} x max_num_seqs {seqs} needs {row * seqs / 1e9:.1f} GB of KV cache, "
            f"{free / 1e9:.1f} GB are free: lower max_model_len or max_num_seqs"
        )
    return length, seqs
