"""The engine as of phase 3: phase 2's, with a choice of who attends and of the numbers that the cache keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from module0_profiling.course.parts import Use, resolve
from phase0_prototype.config import ModelConfig, load_config
from phase0_prototype.engine import ROOM as PROTOTYPE
from phase0_prototype.engine import Engine
from phase0_prototype.engine_config import resolve_device, resolve_dtype
from phase0_prototype.errors import UserError
from phase0_prototype.hub import resolve_model
from phase0_prototype.linear import LinearFormat
from phase0_prototype.loop import Loop
from phase1_memory import engine as paged
from phase1_memory.kv_cache import PagedKVCache
from phase2_rope.deepseek import ARCHITECTURES as EARLIER
from phase2_rope.deepseek import DeepseekConfig
from phase2_rope.engine import ROOM as ROPE
from phase3_paged_attention import backends
from phase3_paged_attention.backends import Candidate
from phase3_paged_attention.engine_config import AttentionConfig
from phase3_paged_attention.gemma import ARCHITECTURES
from phase3_paged_attention.kv_scales import settle_scales
from phase3_paged_attention.layers import PagedLayers

ROOM = __name__.rpartition(".")[0]


def build(
    config: AttentionConfig,
    use: Use | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    layers: type[PagedLayers] = PagedLayers,
    more_backends: Mapping[str, backends.Make] = MappingProxyType({}),
    schedule: Callable[[PagedKVCache, Any], Any] | None = None,
    loop: Callable[..., Any] = Loop,
) -> Engine:
    """Load a checkpoint and assemble an engine around it; arguments and errors as in phase 1.

    `more_backends` are asked before those of this phase.
    """
    use = use or Use()
    known = ARCHITECTURES
    if use.of(PROTOTYPE) != "solution":  # its model knows neither caps nor numbers of other types
        known = EARLIER
        if config.kv_cache_dtype != "auto":
            raise UserError(f"kv_cache_dtype={config.kv_cache_dtype!r} needs phase0=solution: its layers quantise")
    attended = partial(_layers, config, use, layers, more_backends)
    built = paged.build(config, use, advance, layers=attended, architectures=known, schedule=schedule, loop=loop)
    settle_scales(built.model, resolve_model(config.model))
    return built


def explain(
    model: str,
    kv_cache_dtype: str = "auto",
    device: str = "auto",
    more_backends: Mapping[str, backends.Make] = MappingProxyType({}),
) -> list[tuple[str, str]]:
    """(name, why it would or would not attend) of each backend for a model here, best first; no weights are read.

    Raises:
        UserError: there is no such model, device or format of a cache.
    """
    settings, use = AttentionConfig(model, device=device, kv_cache_dtype=kv_cache_dtype), Use()
    config, where = load_config(resolve_model(model), architectures=ARCHITECTURES), resolve_device(device)
    built = _unattended(settings, use, PagedLayers, config, resolve_dtype("auto", where, config.dtype), where, None, 1)
    asked = _asked(built, use, more_backends)
    return backends.explained(asked, next((candidate for candidate in asked if backends.fits(candidate)), None))


def _layers(
    config: AttentionConfig,
    use: Use,
    kind: type[PagedLayers],
    more: Mapping[str, backends.Make],
    *described: Any,
) -> PagedLayers:
    """Layers with the backend that was asked for, or the first that can."""
    built = _unattended(config, use, kind, *described)
    built.backend = backends.choose(_asked(built, use, more), config.attention_backend).backend
    return built


def _unattended(
    config: AttentionConfig,
    use: Use,
    kind: type[PagedLayers],
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: Any,
    max_model_len: int,
    number_format: LinearFormat | None = None,
) -> PagedLayers:
    return kind(
        model,
        dtype,
        device,
        backend,
        max_model_len,
        number_format,
        rope=resolve(ROPE, "rope", use),
        mla=resolve(ROPE, "mla", use),
        quantise=resolve(ROOM, "kernels.quantise", use),
        kv_cache_dtype=config.kv_cache_dtype,
        gathered=use.of(PROTOTYPE) != "solution",
    )


def _asked(layers: PagedLayers, use: Use, more: Mapping[str, backends.Make] = MappingProxyType({})) -> list[Candidate]:
    """Every backend, asked about all kinds of layers that the model has."""
    config = layers.config
    specs = list(dict.fromkeys(layers.attention_spec(layer) for layer in range(config.num_layers)))
    latent = config.latent if isinstance(config, DeepseekConfig) else None
    return backends.candidates(specs, layers.device, use, latent, more)
