"""What share of the read bandwidth decoding reaches, on a machine whose bandwidth changes while it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from module0_profiling.hardware import detect
from module0_profiling.peak_measure import read_bandwidth_now
from phase0_prototype import workloads
from phase0_prototype.llm import LLM

PROMPT, NEW = 128, 24
CHANGED = 1.2  # the bandwidth before a run over that after it, or the inverse: the run saw both, and says nothing


@dataclass(frozen=True)
class Shares:
    """One entry a round: bytes/s that decode steps read, and the bandwidth around them.

    Attributes:
        read: bytes that a step must read, over its time.
        bandwidth: the mean of before and after.
        skipped: rounds that were repeated because the bandwidth had changed between before and after.
    """

    read: tuple[float, ...]
    bandwidth: tuple[float, ...]
    skipped: int

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each round, 0..1."""
        return tuple(r / b for r, b in zip(self.read, self.bandwidth, strict=True))


def decode_shares(llm: LLM, rounds: int) -> Shares:
    """Decode one sequence and measure the bandwidth in turns, until `rounds` were steady, or four times as many ran."""
    device = detect(str(llm.engine.device))
    prompts = workloads.random_prompts(llm.engine.config.vocab_size, [PROMPT])
    workloads.run_ours(llm, prompts, NEW)  # compiles
    read: list[float] = []
    bandwidth: list[float] = []
    skipped, before = 0, read_bandwidth_now(device)
    while len(read) < rounds:
        step = workloads.run_ours(llm, prompts, NEW).per_step
        after = read_bandwidth_now(device)
        if max(before, after) > CHANGED * min(before, after) and skipped < 3 * rounds:
            skipped += 1
        else:
            read.append(workloads.bytes_per_step(llm, PROMPT, NEW) / step)
            bandwidth.append((before + after) / 2)
        before = after
    return Shares(tuple(read), tuple(bandwidth), skipped)
