"""Servers to be treated badly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phase0_prototype.tests.conftest import one_thread  # noqa: F401  the same fixture here
from phase4_scheduler.measures.chaos_server import Victim

# A small batch, so that requests wait; few blocks, so that they are preempted; small steps, so that prompts are cut
NULL = {
    "step_seconds": 0.003,
    "max_num_seqs": 16,
    "num_blocks": 256,
    "max_model_len": 2048,
    "max_num_batched_tokens": 128,
}
TINY = {
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 16,
    "max_model_len": 512,
    "num_blocks": 34,
    "block_size": 16,
    "max_num_batched_tokens": 64,
    "preemption": "swap",
    "swap_bytes": 0,
}
OPTIONS = ("--log-interval", "3600", "--shutdown-timeout", "60")  # the last line of the log, and time to drain


@pytest.fixture(scope="module")
def null() -> Iterator[Victim]:
    """Tokens without a model."""
    with Victim("null", NULL, OPTIONS) as victim:
        yield victim.wait_ready()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """The shipped model with little memory, whose preempted sequences go to a file."""
    more = {"offload_dir": str(tmp_path_factory.mktemp("offload")), "offload_bytes": 8 << 20}
    with Victim("titan-tiny", TINY | more, OPTIONS) as victim:
        yield victim.wait_ready()
