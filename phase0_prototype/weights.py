"""Copy a checkpoint's tensors to where the model wants them, with little more memory than the model itself.

Files are memory-mapped. A page of the file that has been read counts as this process's memory until the mapping goes,
so the mapping is dropped and made anew every `_window` bytes. Without that, a load peaks at twice the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phase0_prototype.errors import CheckpointError
from phase0_prototype.safetensors_files import StoredTensor, first_few, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Destination:
    """Where one stored tensor goes.

    `load` gets it on the CPU, in the file's dtype, as a view of the mapped file: it must copy (and cast), and keep no
    reference, or the file's pages stay in memory. `dtypes` are the stored types it takes, in safetensors' names.
    A single number (shape [1]) may be stored without a dimension. What is `optional` is loaded where it is stored.
    """

    shape: tuple[int, ...]
    load: Callable[[Tensor], object]
    dtypes: frozenset[str] = FLOATS
    optional: bool = False


@dataclass(frozen=True)
class LoadStats:
    """What a load did: bytes read from files, wall seconds, tensors handed out."""

    bytes: int
    seconds: float
    tensors: int


def load_weights(
    directory: Path,
    destinations: Mapping[str, Destination],
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> LoadStats:
    """Call `load` of every destination once with the tensor of its name; of optional ones, where there is one.

    Order: tensors of more than a twentieth of the whole first, largest first, while the model's own memory is still
    untouched (an embedding copied last would need room twice at the peak); then as they lie in the files.
    `ignore` tells which stored tensors may be left unread; `advance` hears the bytes of each tensor done, for a
    progress bar. Everything is checked before the first call of `load`. Raises CheckpointError, naming file and tensor:
    missing, unexpected, wrong shape, wrong dtype, and all that `stored_tensors` raises.
    """
    started = time.perf_counter()
    stored = stored_tensors(directory)
    _check(directory, stored, destinations, ignore)
    wanted = [tensor for tensor in stored.values() if tensor.name in destinations]
    total = sum(tensor.nbytes for tensor in wanted)
    large = sorted((t for t in wanted if t.nbytes * 20 > total), key=lambda t: -t.nbytes)
    rest = [t for t in wanted if t.nbytes * 20 <= total]
    for run in _runs([*large, *rest], _window(total)):
        _load_run(run, destinations, advance)
    return LoadStats(total, time.perf_counter() - started, len(wanted))


def _window(total: int) -> int:
    """Bytes read through one mapping: small beside the model, large beside the cost of mapping a file."""
    return max(1 << 20, min(64 << 20, total // 64))


def _runs(tensors: Sequence[StoredTensor], window: int) -> Iterator[list[StoredTensor]]:
    """Cut the sequence into runs of one file and at most `window` bytes (or a single larger tensor)."""
    run: list[StoredTensor] = []
    size = 0
    for tensor in tensors:
        if run and (tensor.file != run[0].file or size + tensor.nbytes > window):
            yield run
            run, size = [], 0
        run.append(tensor)
        size += tensor.nbytes
    if run:
        yield run


def _load_run(
    run: Sequence[StoredTensor], destinations: Mapping[str, Destination], advance: Callable[[int], None]
) -> None:
    """Map the file, hand out the run's tensors, unmap. The mapping lives as long as a tensor made from it."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(run[0].file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{run[0].file}: {_one_line(error)} (at tensor {run[0].name})") from None
    with torch.no_grad(), file as opened:  # a parameter may be copied into in place
        for stored in run:
            try:
                tensor = opened.get_tensor(stored.name)
            except SafetensorError as error:
                raise CheckpointError(f"{stored.file}: tensor {stored.name}: {_one_line(error)}") from None
            destinations[stored.name].load(tensor)
            del tensor
            advance(stored.nbytes)


def _check(
    directory: Path,
    stored: Mapping[str, StoredTensor],
    destinations: Mapping[str, Destination],
    ignore: Callable[[str], bool],
) -> None:
    missing = [name for name, destination in destinations.items() if name not in stored and not destination.optional]
    if missing:
        raise CheckpointError(
            f"{directory}: {_tensors(missing)} missing from the safetensors files: {first_few(missing)}: is "
            "config.json of the same model?"
        )
    unexpected = [name for name in stored if name not in destinations and not ignore(name)]
    if unexpected:
        file = stored[unexpected[0]].file
        raise CheckpointError(f"{file}: {_tensors(unexpected)} not in this model: {first_few(unexpected)}")
    for name, destination in destinations.items():
        if name not in stored:
            continue
        tensor, shape = stored[name], tuple(destination.shape)
        if tensor.shape != shape and not (tensor.shape == () and shape == (1,)):
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(destination.shape)}"
            )
        if tensor.dtype not in destination.dtypes:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, expected "
                f"{' or '.join(sorted(destination.dtypes))}: is the checkpoint quantised?"
            )


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
