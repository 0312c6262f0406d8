"""How many blocks the KV cache gets: from what was asked for, or from what the device has left. Arithmetic only.

device memory x gpu_memory_utilization = weights + largest activations of a step + KV cache      (CUDA)
free memory / 2, at most what max_num_seqs sequences of max_model_len can use                    (CPU)
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from phase0_prototype.config import ModelConfig
from phase0_prototype.engine_config import DEFAULT_CONTEXT
from phase0_prototype.errors import UserError
from phase0_prototype.kv_spec import KVSpec
from phase1_memory.engine_config import PagedConfig


@dataclass(frozen=True)
class Memory:
    """What a device has, in bytes: of which `free` is not in use by anybody."""

    total: int
    free: int


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes of an engine.

    Attributes:
        num_blocks: of the cache.
        max_model_len: longest sequence, prompt included.
        block_bytes: of one block, all layers.
    """

    num_blocks: int
    max_model_len: int
    block_bytes: int


def memory_of(device: torch.device, weight_bytes: int) -> Memory:
    """What is left beside the model's weights, which are allocated by now.

    Args:
        device: cpu, cuda or mps.
        weight_bytes: on a CPU no page of them has been touched yet: they are taken off what is free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    memory = psutil.virtual_memory()
    return Memory(memory.total, memory.available - weight_bytes)


def activation_bytes(model: ModelConfig, tokens: int, itemsize: int) -> int:
    """Largest memory that a step of so many tokens needs beside weights and cache.

    That is the feed-forward block: gate and up together, their product, and the residual stream with its norm; plus
    float32 logits of a few hundred rows.
    """
    widest = 3 * model.intermediate_size + 3 * model.hidden_size
    return tokens * widest * itemsize + min(tokens, 256) * model.vocab_size * (4 + itemsize)


def plan_memory(
    config: PagedConfig, model: ModelConfig, spec: KVSpec, device: torch.device, memory: Memory
) -> MemoryPlan:
    """Blocks and lengths that fit.

    Raises:
        UserError: what was asked for does not fit, with the numbers.
    """
    limit, page = model.longest, config.block_size
    asked = config.max_model_len
    if asked is not None and asked > limit:
        raise UserError(f"max_model_len {asked} is more than the model's {limit} positions: lower it")
    if memory.free < 0:
        raise UserError(
            f"{config.model} does not fit: its weights need {-memory.free / 1e9:.1f} GB more than is free of the "
            f"{memory.total / 1e9:.1f} GB here: choose a smaller model or free some memory"
        )
    length = asked or min(limit, DEFAULT_CONTEXT)
    block_bytes = spec.bytes_per_token * page
    budget = _budget(config, model, spec, device, memory)
    if config.num_blocks is not None:
        blocks = config.num_blocks
    elif config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // block_bytes
    else:
        blocks = min(budget // block_bytes, config.max_seqs * -(-length // page))
    if blocks * block_bytes > memory.free:
        raise UserError(
            f"{blocks} blocks of {page} tokens need {blocks * block_bytes / 1e9:.2f} GB of KV cache, "
            f"{memory.free / 1e9:.2f} GB are free on {device}: lower num_blocks or kv_cache_memory_bytes"
        )
    if blocks * page < length:
        if asked is not None or blocks < 1:
            raise UserError(
                f"a sequence of max_model_len {length} needs {-(-length // page)} blocks of {block_bytes / 1e6:.3g} "
                f"MB, the KV cache has {max(blocks, 0)}: lower max_model_len, or raise {_larger(config, device)}"
            )
        length = blocks * page
    return MemoryPlan(blocks, length, block_bytes)


def _budget(config: PagedConfig, model: ModelConfig, spec: KVSpec, device: torch.device, memory: Memory) -> int:
    """Bytes for the cache when nobody said how many."""
    if device.type != "cuda":
        return memory.free // 2
    used = memory.total - memory.free
    activations = activation_bytes(model, config.max_num_batched_tokens, spec.dtype.itemsize)
    return max(0, int(memory.total * config.gpu_memory_utilization) - used - activations)


def _larger(config: PagedConfig, device: torch.device) -> str:
    """The setting that makes the cache larger."""
    if config.num_blocks is not None:
        return "num_blocks"
    by_share = device.type == "cuda" and config.kv_cache_memory_bytes is None
    return "gpu_memory_utilization" if by_share else "kv_cache_memory_bytes"
