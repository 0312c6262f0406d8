"""The kernel's own count of page faults, in a process that allocates and frees as a forward pass does."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from module0_profiling import rooms
from phase0_prototype import cpu_memory

WORK = """
import resource, sys
import torch
from phase0_prototype.cpu_memory import keep_freed_memory

torch.set_num_threads(1)
sizes = [int(mib) << 18 for mib in sys.argv[2:]]  # float32 numbers in each tensor

def layers(count):
    for _ in range(count):
        for size in sizes:
            torch.zeros(size).add(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
layers(25)  # aligned blocks find their places only after each size was freed a few times
before = faults()
layers(10)
print(kept, faults() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")


def run(mode: str, *mebibytes: int) -> tuple[str, int]:
    """What `keep_freed_memory` answered, and the page faults of ten layers with tensors of these sizes."""
    thresholds = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
    environment = {name: value for name, value in os.environ.items() if name not in thresholds}
    environment["GLIBC_TUNABLES"] = "glibc.malloc.arena_max=8"  # no threshold, so no decision about them
    command = [sys.executable, "-c", WORK, mode, *map(str, mebibytes)]
    done = subprocess.run(
        command, cwd=rooms.ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    answer, faults = done.stdout.split()
    return answer, int(faults)


@glibc
@pytest.mark.parametrize("sizes", [(8,), (23, 12, 4)])
def test_tensors_of_a_layer_that_was_freed_cost_the_next_one_no_page_faults(sizes):
    _, before = run("leave", *sizes)
    answer, after = run("keep", *sizes)
    assert answer == "True"
    assert before > 200, "malloc keeps its memory here by itself: this test shows nothing"
    assert after < before / 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1048576"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_TOP_PAD_", "0"),
        ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_threshold=1048576"),
    ],
)
def test_what_the_user_has_set_in_the_environment_is_respected(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert cpu_memory.keep_freed_memory() is False


@pytest.mark.parametrize("error", [ValueError("unrecognized configuration name"), AttributeError("confstr"), OSError()])
def test_nothing_happens_where_the_c_library_is_not_glibc(monkeypatch, error):
    def confstr(name):
        raise error

    monkeypatch.setattr(cpu_memory.os, "confstr", confstr, raising=False)
    assert cpu_memory.keep_freed_memory() is False
