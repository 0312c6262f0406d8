"""Which tensor lies where in a checkpoint's safetensors files, found from their headers alone.

A safetensors file is 8 bytes (little-endian length of the header), a JSON header of name -> dtype, shape, byte
range, then the bytes (https://github.com/huggingface/safetensors#format). Reading the headers first means that a
damaged or foreign checkpoint is refused in milliseconds, by the name of the tensor, before anything is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase0_prototype.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BYTES_PER_ELEMENT = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
AGAIN = "download the checkpoint again"
MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it. `start` is its first byte, counted from the start of the file."""

    name: str
    file: Path
    dtype: str  # safetensors' name: BF16, F32, I32, ...
    shape: tuple[int, ...]
    start: int
    nbytes: int


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, in file order, from its single file, its index, or every *.safetensors.

    Raises CheckpointError: no weights, a shard or an indexed tensor missing, a tensor in two files, a header that is
    corrupt, a file that is cut short.
    """
    index = directory / INDEX
    if (directory / SINGLE).is_file():
        weight_map, files = None, [directory / SINGLE]
    elif index.is_file():
        weight_map = _read_index(index)
        files = [directory / name for name in sorted(set(weight_map.values()))]
        _check_shards_exist(index, weight_map)
    else:
        weight_map, files = None, sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(_no_weights(directory))

    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                first = tensors[tensor.name].file.name
                raise CheckpointError(f"{file}: tensor {tensor.name} is in {first} too: remove the file that is stale")
            tensors[tensor.name] = tensor
    for name, shard in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{directory / shard} lacks tensor {name}, which {INDEX} says it holds: {AGAIN}")
    return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of their bytes. Raises CheckpointError naming the file and the tensor."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{file}: corrupt or cut short: a header of {length} bytes, {size} in the file")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, not UTF-8; or the CheckpointError above
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: corrupt header, not JSON ({error}): {AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: corrupt header, not a JSON object: {AGAIN}")
    tensors = [_entry(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: tensor.start)
    for tensor in tensors:
        if tensor.start + tensor.nbytes > size:
            raise CheckpointError(
                f"{file}: cut short: tensor {tensor.name} needs bytes up to {tensor.start + tensor.nbytes}, "
                f"the file has {size}: {AGAIN}"
            )
    return tensors


def _entry(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        nbytes = math.prod(shape) * BYTES_PER_ELEMENT[dtype] if dtype in BYTES_PER_ELEMENT else end - begin
        sound = begin >= 0 and end - begin == nbytes and all(size >= 0 for size in shape)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: corrupt header at tensor {name}: {json.dumps(entry)[:120]}: {AGAIN}")
    return StoredTensor(name, file, dtype, shape, data + begin, nbytes)


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index}: not JSON with a weight_map: {AGAIN}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty or not an object: {AGAIN}")
    for name, shard in weight_map.items():
        # A shard is a file beside its index: anything else would let a download read files elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {name} is in {shard!r}: expected the name of a .safetensors file")
    return weight_map


def _check_shards_exist(index: Path, weight_map: Mapping[str, str]) -> None:
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            names = [name for name, file in weight_map.items() if file == shard]
            raise CheckpointError(f"{index.parent / shard} is missing, it holds {first_few(names)}: {AGAIN}")


def _no_weights(directory: Path) -> str:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        return (
            f"{directory} has weights in PyTorch's pickle format only, which can run code when loaded: convert them "
            "with transformers (AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR))"
        )
    return f"{directory} has no *.safetensors file: give the directory of a Hugging Face checkpoint"


def first_few(names: Sequence[str], limit: int = 3) -> str:
    """The first names and how many more there are, for a message of one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
