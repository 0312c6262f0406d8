"""Keep freed memory in the process: a forward pass on a CPU allocates and frees the same large tensors in every layer.

glibc serves an allocation above a threshold with `mmap` and unmaps it at `free`, and it gives the top of its heap back
to the kernel. The next layer's tensor then consists of fresh pages, which the kernel maps and zeroes at their first
touch: page faults. Two thresholds of mallopt(3) keep the pages; the price is that the process stays at its peak size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype

# Parameters of mallopt, as glibc's malloc.h numbers them.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

_LARGEST_THRESHOLD = 32 << 20  # bytes; DEFAULT_MMAP_THRESHOLD_MAX of 64-bit glibc, which refuses more
_NEVER_TRIM = 2**31 - 1  # bytes free at the top of the heap; the parameter is an int
_TOP_PAD = 64 << 20  # bytes by which the heap grows at a time; untouched ones take no memory

_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TUNABLES = ("glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold", "glibc.malloc.top_pad")


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, and take tensors of up to 32 MiB from memory that was freed before.

    For programs that own their process (a command, a server, a benchmark), once, after the weights are loaded: what
    loading frees should go back. The setting holds for the whole process, so a library leaves it alone. Larger tensors
    are still mapped and unmapped. Without effect, and without harm, where another malloc is preloaded.

    Returns:
        Whether it was done. False where the C library isn't glibc (macOS, Windows, musl), where it refuses, and where
        the user's environment has set one of these thresholds, which is respected.
    """
    if _user_has_decided() or not _has_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_TOP_PAD, _TOP_PAD))
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)


def _has_glibc() -> bool:
    """Whether the C library says that it is glibc; the others don't know the question."""
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):
        return False


def _user_has_decided() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in _VARIABLES) or any(name in tunables for name in _TUNABLES)


def untouched_zeros(shape: tuple[int, ...], kind: dtype) -> Tensor:
    """Zeros in main memory that take none before they are written: the kernel zeroes a page at its first touch.

    `torch.zeros` writes them all, seconds for a cache of which a server may never fill the most.
    """
    import torch

    nbytes = math.prod(shape) * kind.itemsize
    if not nbytes:
        return torch.zeros(shape, dtype=kind)
    pages = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(kind).view(shape)
