"""What a Triton kernel really asks memory for: its own addresses, taken down while the interpreter runs it.

    with Trace({"q": q, "keys": keys, "values": values}) as trace:
        launch()
    trace.bytes("keys")             # asked for by all programs together
    trace.loads("keys").sectors     # in sectors of 32 bytes, as a GPU moves them
    trace.loads("keys").distinct    # what memory must give where a cache answers everything that is asked for twice

It works on CPU tensors under TRITON_INTERPRET=1 and knows nothing of what the kernel computes, so it can check a model.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

SECTOR = 32  # bytes that a GPU moves at least
ELSEWHERE = "elsewhere"  # what lies in no tensor that was named
WRAPPED = ("set_grid_dim", "create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw")


@dataclass(frozen=True)
class Moved:
    """Loads, or stores, of one tensor. All but the first are bytes.

    Attributes:
        instructions: of whole tiles, as they stand in the kernel, with an element that is not masked.
        requested: elements that are not masked, as often as they are asked for.
        sectors: sectors of 32 bytes that an instruction touches, counted once an instruction.
        unique: elements that a program touches, counted once a program.
        distinct: elements that any program touches, counted once.
    """

    instructions: int = 0
    requested: int = 0
    sectors: int = 0
    unique: int = 0
    distinct: int = 0


class Trace:
    """Takes down the addresses of all loads and stores of the kernels that run inside the `with`.

    An atomic operation counts as a load and a store.

    Args:
        tensors: CPU tensors by name. Their memory must not overlap: of slices of one tensor, name the whole.

    Raises:
        ValueError: two tensors overlap, or one is not on the CPU.
        RuntimeError: on entering, where Triton does not interpret.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} is on {tensor.device}: the interpreter works on copies, name CPU tensors")
        spans = sorted((*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel())
        for (_, end, first), (start, _, second) in itertools.pairwise(spans):
            if start < end:
                raise ValueError(f"{first} and {second} overlap in memory: name the tensor that holds both")
        self._starts = np.array([start for start, _, _ in spans], dtype=np.uint64)
        self._ends = np.array([end for _, end, _ in spans], dtype=np.uint64)
        self._names = [name for _, _, name in spans]
        self._launches = 0
        self._events: dict[tuple[str, str], list[_Event]] = defaultdict(list)

    def __enter__(self) -> Trace:
        import triton
        from triton.runtime.interpreter import interpreter_builder

        if not triton.knobs.runtime.interpret:
            raise RuntimeError("addresses can be seen in the interpreter only: set TRITON_INTERPRET=1 before the start")
        self._builder = interpreter_builder
        self._before = dict(vars(interpreter_builder))
        # Wrapped on the instance that the interpreter uses, in front of its class's methods, and taken off on leaving.
        # Loads and stores without a mask, and those by descriptors, end in the masked ones.
        self._wrap("set_grid_dim", self._new_launch)
        self._wrap("create_masked_load", lambda ptrs, mask, *_, **__: self._note("load", ptrs, mask))
        self._wrap("create_masked_store", lambda ptrs, value, mask, *_, **__: self._note("store", ptrs, mask))
        self._wrap("create_atomic_cas", lambda ptr, *_, **__: self._note_both(ptr, None))
        self._wrap("create_atomic_rmw", lambda op, ptr, value, mask, *_, **__: self._note_both(ptr, mask))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in WRAPPED:
            if name in self._before:  # by a trace around this one
                setattr(self._builder, name, self._before[name])
            else:
                delattr(self._builder, name)

    @property
    def programs(self) -> int:
        """Programs that moved something."""
        return len({event.program for events in self._events.values() for event in events})

    def loads(self, *names: str) -> Moved:
        """Of the tensors of these names, of all without any. `elsewhere` is what lies in none."""
        return self._sum("load", names)

    def stores(self, *names: str) -> Moved:
        """As `loads`."""
        return self._sum("store", names)

    def bytes(self, *names: str) -> int:
        """Bytes that all programs together asked for, loads and stores."""
        return self.loads(*names).requested + self.stores(*names).requested

    def _wrap(self, name: str, before: Callable[..., None]) -> None:
        method = getattr(self._builder, name)

        @functools.wraps(method)
        def noted(*args: Any, **keywords: Any) -> Any:
            before(*args, **keywords)
            return method(*args, **keywords)

        setattr(self._builder, name, noted)

    def _new_launch(self, *_: int) -> None:
        self._launches += 1

    def _note_both(self, ptrs: Any, mask: Any) -> None:
        self._note("load", ptrs, mask)
        self._note("store", ptrs, mask)

    def _note(self, what: str, ptrs: Any, mask: Any) -> None:
        addresses = ptrs.data if mask is None else ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        addresses = np.ravel(addresses).astype(np.uint64, copy=False)
        if not addresses.size:
            return
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        program = (self._launches, *self._builder.grid_idx)
        nearest = np.searchsorted(self._starts, addresses, side="right") - 1
        for i in np.unique(nearest):
            mine = addresses[nearest == i]
            within = mine < (self._ends[i] if i >= 0 else 0)
            for name, found in ((self._names[i] if i >= 0 else "", mine[within]), (ELSEWHERE, mine[~within])):
                if found.size:
                    self._events[what, name].append(_Event(program, found, width))

    def _sum(self, what: str, names: tuple[str, ...]) -> Moved:
        every = (*self._names, ELSEWHERE)
        for name in names:
            if name not in every:
                raise KeyError(f"{name!r} is not traced: there are {', '.join(every)}")
        parts = [_counted(self._events.get((what, name), [])) for name in names or every]
        return Moved(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))


@dataclass(frozen=True)
class _Event:
    program: tuple[int, ...]
    addresses: np.ndarray
    width: int  # bytes of an element


def _counted(events: list[_Event]) -> Moved:
    by_program: dict[tuple[Any, ...], list[np.ndarray]] = defaultdict(list)
    by_width: dict[int, list[np.ndarray]] = defaultdict(list)
    for event in events:
        by_program[(event.width, *event.program)].append(event.addresses)
        by_width[event.width].append(event.addresses)
    return Moved(
        len(events),
        sum(event.addresses.size * event.width for event in events),
        sum(SECTOR * np.unique(event.addresses // SECTOR).size for event in events),
        sum(width * np.unique(np.concatenate(found)).size for (width, *_), found in by_program.items()),
        sum(width * np.unique(np.concatenate(found)).size for width, found in by_width.items()),
    )


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address, and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
