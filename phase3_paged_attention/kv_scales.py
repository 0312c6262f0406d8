"""The scales of an 8-bit cache: a file beside the checkpoint, for checkpoints that have none themselves.

    {"kv_cache_dtype": "fp8_e4m3", "tokens": 8192, "k_scale": [0.04, ...], "v_scale": [0.01, ...]}

A number for each layer, found by `titan calibrate-kv`: the largest key (value) that it met, over the largest number of
the format.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from phase0_prototype.config_fields import read_json
from phase0_prototype.errors import UserError
from phase3_paged_attention.kv_format import FORMATS, KVFormat, checked_scale
from phase3_paged_attention.layers import QuantisedAttention

FILE = "kv_cache_scales.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVScales:
    """Scales of all layers.

    Attributes:
        kv_cache_dtype: the format that they were found for.
        tokens: of the text that they were found with.
        k_scale, v_scale: for each layer.
    """

    kv_cache_dtype: str
    tokens: int
    k_scale: tuple[float, ...]
    v_scale: tuple[float, ...]

    def of(self, side: str, layer: int, kept: KVFormat) -> float:
        """The scale of a layer's keys (k) or values (v) in another format: what was found is the largest number."""
        found = (self.k_scale if side == "k" else self.v_scale)[layer]
        return found * FORMATS[self.kv_cache_dtype].largest / kept.largest


def read_scales(file: Path, layers: int) -> KVScales:
    """The scales in a file.

    Raises:
        UserError: it is not such a file, or one of a model with another number of layers.
    """
    raw = read_json(file)
    kind, tokens = raw.get("kv_cache_dtype"), raw.get("tokens")
    if kind not in FORMATS:
        raise UserError(f"{file}: kv_cache_dtype is {kind!r}: expected one of {', '.join(FORMATS)}")
    if not isinstance(tokens, int):
        raise UserError(f"{file}: tokens is {tokens!r}: expected a whole number")
    sides = []
    for name in ("k_scale", "v_scale"):
        found = raw.get(name)
        if not isinstance(found, list) or len(found) != layers:
            count = f"{len(found)} numbers" if isinstance(found, list) else repr(found)
            raise UserError(f"{file}: {name} has {count}, the model has {layers} layers: is it another model's file?")
        sides.append(tuple(checked_scale(value, f"{file}: {name}[{i}]") for i, value in enumerate(found)))
    return KVScales(kind, tokens, *sides)


def write_scales(file: Path, scales: KVScales) -> None:
    """Write what `read_scales` reads."""
    file.write_text(json.dumps(asdict(scales), indent=1) + "\n")


def settle_scales(model: nn.Module, directory: Path) -> None:
    """Give scales to the layers of a loaded model that want some and found none in the checkpoint.

    They come from the file beside the checkpoint. Without one they stay 1, and a warning says so.

    Raises:
        UserError: the file is not right.
    """
    layers = [block for block in model.modules() if isinstance(block, QuantisedAttention)]
    missing = [(i, side) for i, block in enumerate(layers) for side in "kv" if block.scales and side not in block.known]
    if not missing:
        return
    kept, file = layers[0].kv_format, directory / FILE
    if not file.is_file():
        log.warning(
            "%s has no scales for a KV cache in %s: what is beyond %g is cut off. `titan calibrate-kv %s` finds them, "
            "kv_cache_dtype=fp8_per_token_head needs none",
            directory, kept.name, kept.largest, directory,
        )  # fmt: skip
        return
    scales = read_scales(file, len(layers))
    for i, side in missing:
        layers[i].set_scale(side, scales.of(side, i, kept))
