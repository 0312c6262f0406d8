"""Hardware counters of one kernel: the `ncu` line that takes them, and what they say by themselves.

    titan ncu-command --kernel 'matmul.*' -- python -m phase0_prototype.kernels.matmul
    <that line> > matmul.csv
    titan ncu matmul.csv

`ncu_csv` reads what ncu printed, `ncu_verdict` judges it. Metric names are those of the Nsight Compute documentation
(Kernel Profiling Guide, "Metrics Reference"). No name is the same on all GPUs and versions of ncu, so two are asked for
where two are in use; one that a GPU lacks is printed as n/a and counts as not taken.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum.per_second",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__maximum_warps_per_active_cycle_pct",
    "launch__registers_per_thread",
    "launch__waves_per_multiprocessor",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "launch__occupancy_limit_blocks",
    "launch__occupancy_limit_warps",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum",
    "smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct",
    "smsp__sass_average_data_bytes_per_sector_mem_global_op_st.pct",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
)
LIMITERS = {
    "launch__occupancy_limit_registers": "registers",
    "launch__occupancy_limit_shared_mem": "shared memory",
    "launch__occupancy_limit_blocks": "blocks",
    "launch__occupancy_limit_warps": "warps",
    "launch__occupancy_limit_barriers": "barriers",
}


class NcuError(ValueError):
    """A file that is not what `ncu --csv` prints: one line with what is wrong and the remedy."""

    is_user_error = True  # the command line prints it as one line


@dataclass(frozen=True)
class KernelCounters:
    """One launch of one kernel.

    Attributes:
        kernel: its name, as ncu prints it.
        grid, block, capability: as printed, such as "(16384, 1, 1)" and "9.0"; "" where the file lacks them.
        metrics: metric name -> value in seconds, bytes, bytes/s, percent or a plain count; absent when not taken.
    """

    kernel: str
    grid: str = ""
    block: str = ""
    capability: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """How long the kernel ran."""
        return self.metrics.get("gpu__time_duration.sum")

    @property
    def dram_bytes_per_second(self) -> float | None:
        """Bytes that moved between DRAM and the L2 cache, read and written, per second."""
        return self.metrics.get("dram__bytes.sum.per_second")

    @property
    def dram_percent(self) -> float | None:
        """The same in percent of what the DRAM can do."""
        name = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
        return self._first(name, f"gpu__{name.replace('__', '_')}")

    @property
    def memory_percent(self) -> float | None:
        """The busiest part of the memory system in percent: L1, shared memory, L2 or DRAM."""
        return self._first("gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed")

    @property
    def sm_percent(self) -> float | None:
        """The busiest pipe of the SMs in percent."""
        return self._first("sm__throughput.avg.pct_of_peak_sustained_elapsed")

    @property
    def tensor_percent(self) -> float | None:
        """How busy the tensor cores are, in percent; the busiest of the counters that the file has."""
        found = [
            value
            for name, value in self.metrics.items()
            if name.startswith(("sm__inst_executed_pipe_tensor", "sm__pipe_tensor")) and ".pct_of_peak" in name
        ]
        return max(found, default=None)

    @property
    def achieved_occupancy(self) -> float | None:
        """Warps that were resident on average, in percent of the warp slots."""
        return self._first("sm__warps_active.avg.pct_of_peak_sustained_active")

    @property
    def theoretical_occupancy(self) -> float | None:
        """Warps that could be resident, in percent of the warp slots."""
        return self._first("sm__maximum_warps_per_active_cycle_pct")

    @property
    def occupancy_limiter(self) -> str | None:
        """What keeps another block from an SM: registers, shared memory, blocks, warps; several when they tie."""
        limits = {what: self.metrics[name] for name, what in LIMITERS.items() if name in self.metrics}
        lowest = min(limits.values(), default=0.0)
        return " and ".join(what for what, blocks in limits.items() if blocks == lowest) or None

    @property
    def registers(self) -> float | None:
        """Registers of a thread."""
        return self._first("launch__registers_per_thread")

    @property
    def waves(self) -> float | None:
        """How often the grid fills the whole GPU: 0.5 leaves half of it idle, 1.1 nearly half of the second wave."""
        return self._first("launch__waves_per_multiprocessor")

    @property
    def sectors_per_load(self) -> float | None:
        """Sectors of 32 bytes that one load of a warp touches: 4 is ideal for 32-bit elements, 16 for 128-bit ones."""
        return self._per_request("ld")

    @property
    def sectors_per_store(self) -> float | None:
        """The same for stores."""
        return self._per_request("st")

    @property
    def load_efficiency(self) -> float | None:
        """Percent of the bytes of loaded sectors that a thread asked for: 100 is coalesced, whatever the width."""
        return self._first("smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct")

    @property
    def store_efficiency(self) -> float | None:
        """The same for stores."""
        return self._first("smsp__sass_average_data_bytes_per_sector_mem_global_op_st.pct")

    @property
    def bank_conflicts(self) -> float | None:
        """Passes over shared memory that were needed only because lanes met in a bank."""
        name = "l1tex__data_bank_conflicts_pipe_lsu"
        parts = [self.metrics[p] for op in ("ld", "st") if (p := f"{name}_mem_shared_op_{op}.sum") in self.metrics]
        return self._first(f"{name}_mem_shared.sum", f"{name}.sum", default=sum(parts) if parts else None)

    @property
    def conflict_share(self) -> float | None:
        """Those passes over all passes over shared memory, 0..1; None without shared memory."""
        passes = self._first("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum")
        return self.bank_conflicts / passes if passes and self.bank_conflicts is not None else None

    def _first(self, *names: str, default: float | None = None) -> float | None:
        return next((self.metrics[name] for name in names if name in self.metrics), default)

    def _per_request(self, op: str) -> float | None:
        stem = f"pipe_lsu_mem_global_op_{op}"
        requests = self._first(f"l1tex__t_requests_{stem}.sum")
        sectors = self._first(f"l1tex__t_sectors_{stem}.sum")
        if requests and sectors is not None:
            return sectors / requests
        return self._first(f"l1tex__average_t_sectors_per_request_{stem}.ratio")


def command(
    program: Sequence[str],
    *,
    kernel: str = "",
    skip: int = 0,
    count: int = 0,
    ncu_set: str = "",
    sections: Sequence[str] = (),
    metrics: Sequence[str] = METRICS,
    page: str = "raw",
) -> str:
    """The shell line that profiles `program` and prints what `read` reads.

    Clocks are left alone (`--clock-control none`): by default ncu locks them to the base clock, which makes every time
    longer than in life and needs rights that a shared machine does not give.

    Args:
        program: the command to profile, such as ("python", "-m", "phase0_prototype.kernels.matmul").
        kernel: a regular expression of kernel names; by default every kernel, which can be thousands.
        skip: launches of those kernels to pass by first (warming up).
        count: launches to profile after that; 0 means all.
        ncu_set: a set of sections, such as "full", instead of `metrics`.
        sections: sections, such as "SpeedOfLight", instead of `metrics`.
        metrics: what is counted when neither set nor sections are given.
        page: "raw" or "details".

    Raises:
        NcuError: without a program, or for an unknown page.
    """
    if not program:
        raise NcuError("nothing to profile: titan ncu-command -- python -m phase0_prototype.kernels.matmul")
    if page not in ("raw", "details"):
        raise NcuError(f"page {page!r} is unknown: choose raw or details")
    line = ["ncu", "--csv", "--page", page, "--clock-control", "none", "--target-processes", "all"]
    if kernel:
        line += ["--kernel-name", f"regex:{kernel}"]
    if skip:
        line += ["--launch-skip", str(skip)]
    if count:
        line += ["--launch-count", str(count)]
    if ncu_set:
        line += ["--set", ncu_set]
    for section in sections:
        line += ["--section", section]
    if not ncu_set and not sections:
        line += ["--metrics", ",".join(metrics)]
    return shlex.join([*line, *program])
