"""From settings to a model with weights, in two steps: between them the caller plans memory and may refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phase0_prototype.attention import AttentionBackend
from phase0_prototype.config import ARCHITECTURES, Architecture, ModelConfig, load_config
from phase0_prototype.engine_config import EngineConfig, resolve_device, resolve_dtype, resolve_runner
from phase0_prototype.errors import UserError
from phase0_prototype.hub import resolve_model
from phase0_prototype.layers import Layers
from phase0_prototype.linear import best_format
from phase0_prototype.weights import load_weights


@dataclass(frozen=True)
class Described:
    """A model that is allocated and has no weights yet.

    Attributes:
        directory: of the checkpoint.
        config: the model's.
        model: its modules; no page of their memory has been touched.
        device: where they lie.
        runner: the name of the runner, resolved.
    """

    directory: Path
    config: ModelConfig
    model: Any
    device: torch.device
    runner: str

    def load(self, advance: Callable[[int, int], None]) -> None:
        """Read the weights; `advance` is called with (bytes loaded, bytes in all)."""
        done = 0

        def loaded(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            advance(done, self.model.weight_bytes)

        load_weights(self.directory, self.model.destinations(), ignore=self.model.ignores, advance=loaded)


def describe(
    config: EngineConfig,
    decoder: type[Any],
    backend: AttentionBackend,
    layers: Callable[..., Layers] = Layers,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
) -> Described:
    """Read a checkpoint's config and build its model.

    Args:
        config: the settings.
        decoder: `DecoderModel`, of the part that is in use.
        backend: attention of every layer.
        layers: builds the pieces; each phase has its own.
        architectures: the models that the phase knows.

    Raises:
        UserError: anything about model, device or dtype that the user can put right.
    """
    directory: Path = resolve_model(config.model)
    model_config = load_config(directory, architectures=architectures)
    if model_config.quantization is not None:
        method = model_config.quantization.get("quant_method", "unknown")
        raise UserError(f"{directory} is quantised ({method}): phase 5 loads such checkpoints, give an unquantised one")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, model_config.dtype)
    runner = resolve_runner(config.runner, device)
    number_format = best_format(device, dtype, compiled_row=runner == "compile" and config.max_num_seqs == 1)
    limit = model_config.longest
    positions = min(config.max_model_len or limit, limit)
    model = decoder(model_config, layers(model_config, dtype, device, backend, positions, number_format))
    return Described(directory, model_config, model, device, runner)
