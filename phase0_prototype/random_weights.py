"""Write safetensors files of random tensors, about as fast as a disk takes them.

Matrices and biases are drawn from N(0, 0.02), norms multiply by one, so that activations and logits stay in their usual
range. The normal is sampled by inverse CDF: 16 random bits choose one of 65,536 quantiles. Draws are independent, but
only those 65,536 values occur and none lies beyond 4.4 standard deviations. Sampling in full precision takes five
times as long, and in bfloat16 few of the values would differ.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

STD = 0.02
STORED_AS = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
"""dtype -> (safetensors' name, bytes of an element)."""

_CHUNK = 1 << 20  # elements drawn at a time: bits and result stay in the CPU's cache


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int,
    dtype: str,
    norm: float = 1.0,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write one file with a random tensor for each of `shapes`, in their order; `advance` hears the bytes written.

    Weights of norms are `norm`.

    The header goes first, then each tensor as it is drawn, so that memory in use is a few MB. (The writer of the
    safetensors library wants all tensors at once.) A tensor's values depend on its name, its size and the seed only,
    not on the file it is in. Raises OSError.
    """
    stored, width = STORED_AS[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    quantiles = _as_dtype(_normal_quantiles(), dtype)
    constant = _as_dtype([norm], dtype)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            table = constant if name.endswith("norm.weight") else quantiles
            for chunk in _draw(name, math.prod(shape), seed, table):
                file.write(chunk.data)
                advance(chunk.nbytes)


def _draw(name: str, elements: int, seed: int, table: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield `elements` random entries of the table, in chunks."""
    import numpy as np

    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    for start in range(0, elements, _CHUNK):
        count = min(_CHUNK, elements - start)
        codes = bits.random_raw((count + 3) // 4).view(np.uint16)[:count]
        yield np.take(table, codes, mode="wrap")  # mode "raise" would buffer: 20 times slower


def _normal_quantiles() -> list[float]:
    """The middles of 65,536 equally likely intervals of N(0, STD)."""
    normal = NormalDist(0.0, STD)
    return [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]


def _as_dtype(values: list[float], dtype: str) -> npt.NDArray[Any]:
    """The values' bits in `dtype`; bfloat16, which numpy lacks, as the upper half of float32, rounded to even."""
    import numpy as np

    floats = np.array(values, dtype=np.float32)
    if dtype != "bfloat16":
        return floats.astype(dtype)
    bits = floats.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
