"""Nsight Compute: the command line, the reader and the verdicts.

No capture of a GPU was at hand: these files are written by hand in the format that `ncu --csv` documents and prints
(two header rows and one row a launch for the raw page, one row a metric for the details page).
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from module0_profiling import ncu_commands
from module0_profiling.ncu import METRICS, KernelCounters, NcuError, command
from module0_profiling.ncu_csv import parse, read
from module0_profiling.ncu_verdict import judge

DESCRIBED = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size")
DESCRIBED += ("Grid Size", "Device", "CC")
LOADS = "pipe_lsu_mem_global_op_ld"
STORES = "pipe_lsu_mem_global_op_st"


def row(*cells: object) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


def raw(metrics: dict[str, tuple[str, str]], *, name: str = "copy(const float *, float *)") -> str:
    """One launch on the raw page: metric -> (unit, value)."""
    return "\n".join(
        [
            "loss 3.2, step 1",  # the profiled program prints, too
            "==PROF== Connected to process 411 (/usr/bin/python3.12)",
            '==PROF== Profiling "copy" - 0: 0%....50%....100% - 8 passes',
            row(*DESCRIBED, *metrics),
            row(*[""] * len(DESCRIBED), *(unit for unit, _ in metrics.values())),
            "loss 3.1, step 2, and a comma",
            row("0", "411", "python3.12", "127.0.0.1", name, "1", "7", "(256, 1, 1)", "(16384, 1, 1)", "0", "9.0",
                *(value for _, value in metrics.values())),
            "==PROF== Disconnected from process 411",
        ]
    )  # fmt: skip


COPY = {
    "gpu__time_duration.sum": ("us", "1,234.50"),
    "dram__bytes.sum.per_second": ("Tbyte/s", "3.90"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "81.25"),
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "82.00"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "12.5"),
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": ("%", "0"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "71.30"),
    "sm__maximum_warps_per_active_cycle_pct": ("%", "75"),
    "launch__registers_per_thread": ("register/thread", "40"),
    "launch__waves_per_multiprocessor": ("", "20.69"),
    "launch__occupancy_limit_registers": ("block", "6"),
    "launch__occupancy_limit_shared_mem": ("block", "32"),
    "launch__occupancy_limit_blocks": ("block", "32"),
    "launch__occupancy_limit_warps": ("block", "8"),
    f"l1tex__t_sectors_{LOADS}.sum": ("sector", "16,777,216"),
    f"l1tex__t_requests_{LOADS}.sum": ("request", "4,194,304"),
    f"l1tex__t_sectors_{STORES}.sum": ("sector", "16,777,216"),
    f"l1tex__t_requests_{STORES}.sum": ("request", "1,048,576"),
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": ("", "0"),
}


def test_the_command_leaves_the_clocks_alone_and_asks_for_what_the_verdict_reads():
    line = command(["python", "-m", "some.module"], kernel="matmul_.*", skip=3, count=2)
    words = shlex.split(line)
    assert words[: words.index("--metrics")] == [
        *("ncu", "--csv", "--page", "raw", "--clock-control", "none", "--target-processes", "all"),
        *("--kernel-name", "regex:matmul_.*", "--launch-skip", "3", "--launch-count", "2"),
    ]
    assert words[words.index("--metrics") + 1] == ",".join(METRICS)
    assert words[-3:] == ["python", "-m", "some.module"]
    assert "'regex:matmul_.*'" in line  # a shell must not expand it
    assert judge(parse(raw({name: ("", "1") for name in METRICS}))[0]).lacked == ()


def test_a_set_or_sections_replace_the_metrics():
    assert "--set full python" in command(["python"], ncu_set="full")
    assert "--section Occupancy --section SpeedOfLight python" in command(
        ["python"], sections=("Occupancy", "SpeedOfLight")
    )
    with pytest.raises(NcuError, match="nothing to profile"):
        command([])


def test_the_raw_page_is_read_in_si_units():
    (kernel,) = parse(raw(COPY))
    assert kernel.kernel == "copy(const float *, float *)"
    assert (kernel.grid, kernel.block, kernel.capability) == ("(16384, 1, 1)", "(256, 1, 1)", "9.0")
    assert kernel.seconds == pytest.approx(1234.5e-6)
    assert kernel.dram_bytes_per_second == pytest.approx(3.9e12)
    assert (kernel.dram_percent, kernel.sm_percent, kernel.tensor_percent) == (81.25, 12.5, 0)
    assert (kernel.achieved_occupancy, kernel.theoretical_occupancy) == (71.3, 75)
    assert (kernel.registers, kernel.waves, kernel.occupancy_limiter) == (40, 20.69, "registers")
    assert (kernel.sectors_per_load, kernel.sectors_per_store) == (4, 16)
    assert kernel.bank_conflicts == 0 and kernel.conflict_share is None


@pytest.mark.parametrize(
    ("unit", "value", "seconds"),
    [
        ("ns", "1234500", 1.2345e-3),
        ("nsecond", "1,234,500", 1.2345e-3),
        ("usecond", "1234.5", 1.2345e-3),
        ("msecond", "1.2345", 1.2345e-3),
        ("second", "0.0012345", 1.2345e-3),
        ("us", "1.234,5", 1.2345e-3),  # a German locale
        ("us", "1\u00a0234,5", 1.2345e-3),  # a French one
        ("us", "1'234.5", 1.2345e-3),  # a Swiss one
        ("us", "12,345", 12.345e-3),  # thousands where nothing says otherwise
    ],
)
def test_every_unit_and_way_to_write_a_number(unit: str, value: str, seconds: float):
    (kernel,) = parse(raw({"gpu__time_duration.sum": (unit, value)}))
    assert kernel.seconds == pytest.approx(seconds)


def test_one_cell_says_how_the_others_are_written():
    metrics = {"gpu__time_duration.sum": ("us", "1,234"), "sm__maximum_warps_per_active_cycle_pct": ("%", "71,30")}
    assert parse(raw(metrics))[0].seconds == pytest.approx(1.234e-6)
    metrics["sm__maximum_warps_per_active_cycle_pct"] = ("%", "71.30")
    assert parse(raw(metrics))[0].seconds == pytest.approx(1234e-6)


def test_a_metric_that_a_gpu_lacks_is_none_and_not_zero():
    (kernel,) = parse(raw({**COPY, "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": ("", "n/a")}))
    assert kernel.tensor_percent is None
    assert "tensor core busy share" in judge(kernel).lacked


DETAILS = "\n".join(
    [
        "==PROF== Connected to process 411 (/usr/bin/python3.12)",
        row(*DESCRIBED, "Section Name", "Metric Name", "Metric Unit", "Metric Value", "Rule Name"),
        *(
            row(launch, "411", "python3.12", "127.0.0.1", "matmul", "1", "7", "(256, 1, 1)", "(64, 1, 1)", "0", "9.0",
                section, name, unit, value, "")
            for launch in (0, 1)
            for section, name, unit, value in (
                ("GPU Speed Of Light Throughput", "Memory Throughput", "%", "21.50"),
                ("GPU Speed Of Light Throughput", "DRAM Throughput", "%", "9.75"),
                ("GPU Speed Of Light Throughput", "Duration", "us", f"{launch + 1},200.00"),
                ("GPU Speed Of Light Throughput", "Compute (SM) Throughput", "%", "78.25"),
                ("Memory Workload Analysis", "Memory Throughput", "Gbyte/s", "468.10"),
                ("Launch Statistics", "Registers Per Thread", "register/thread", "128"),
                ("Launch Statistics", "Waves Per SM", "", "3.88"),
                ("Occupancy", "Block Limit SM", "block", "32"),
                ("Occupancy", "Block Limit Registers", "block", "2"),
                ("Occupancy", "Block Limit Shared Mem", "block", "2"),
                ("Occupancy", "Theoretical Occupancy", "%", "25"),
                ("Occupancy", "Achieved Occupancy", "%", "24.10"),
                ("Command line profiler metrics", "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active", "%",
                 "0"),
            )
        ),
    ]
)  # fmt: skip


def test_the_details_page_is_read_by_its_labels():
    first, second = parse(DETAILS)
    assert (first.seconds, second.seconds) == (pytest.approx(1.2e-3), pytest.approx(2.2e-3))
    assert (first.memory_percent, first.dram_percent, first.sm_percent) == (21.5, 9.75, 78.25)
    assert first.dram_bytes_per_second == pytest.approx(468.1e9)
    assert (first.registers, first.waves, first.achieved_occupancy) == (128, 3.88, 24.1)
    assert first.occupancy_limiter == "registers and shared memory"
    assert first.tensor_percent == 0


def counters(**values: float) -> KernelCounters:
    """Counters by short names."""
    names = {
        "us": "gpu__time_duration.sum",
        "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "memory": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
        "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "waves": "launch__waves_per_multiprocessor",
        "achieved": "sm__warps_active.avg.pct_of_peak_sustained_active",
        "possible": "sm__maximum_warps_per_active_cycle_pct",
        "registers": "launch__occupancy_limit_registers",
        "shared": "launch__occupancy_limit_shared_mem",
        "load_efficiency": "smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct",
        "sectors": f"l1tex__average_t_sectors_per_request_{STORES}.ratio",
        "conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
        "passes": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    }
    values = {**values, "us": values.get("us", 500.0) * 1e-6}
    return KernelCounters("k", metrics={names[name]: value for name, value in values.items()})


@pytest.mark.parametrize(
    ("values", "bound", "evidence", "to_try"),
    [
        ({"dram": 88, "sm": 20}, "memory-bound", "DRAM is 88 % busy", "fewer bytes"),
        ({"dram": 20, "memory": 91, "sm": 40}, "memory-bound", "L1, shared memory or L2", "wider accesses"),
        ({"dram": 30, "sm": 85, "tensor": 1}, "compute-bound", "tensor cores are 1 % busy", "use the tensor cores"),
        ({"dram": 30, "sm": 85, "tensor": 84}, "compute-bound", "tensor cores are 84 % busy", "FP8"),
        ({"dram": 30, "sm": 30, "waves": 0.25}, "grid-bound", "75% of the block slots empty", "split-K"),
        ({"dram": 30, "sm": 40, "waves": 0.5, "us": 1000}, "grid-bound", "50% of the block slots", "persistent"),
        ({"dram": 2, "sm": 1, "us": 2.5, "waves": 4}, "launch-bound", "ran 2.5 us", "CUDA graph"),
        ({"dram": 50, "sm": 40, "waves": 1.1}, "tail-bound", "1.10 waves take as long as 2: 45%", "persistent"),
        (
            {"dram": 30, "sm": 30, "waves": 20, "achieved": 24, "possible": 25, "registers": 2, "shared": 9},
            "latency-bound",
            "24 % of the warp slots were in use of 25 % possible, limited by registers",
            "fewer registers",
        ),
        ({"dram": 30, "sm": 30, "waves": 20, "achieved": 90}, "latency-bound", "neither is busy", "unroll"),
        ({"dram": 30, "sm": 30, "waves": 20, "achieved": 20, "possible": 100}, "latency-bound", "20 %", "more blocks"),
    ],
)
def test_the_verdict_and_its_evidence(values: dict[str, float], bound: str, evidence: str, to_try: str):
    verdict = judge(counters(**values))
    assert verdict.bound == bound
    assert evidence in "; ".join(verdict.evidence)
    assert to_try in "; ".join(verdict.to_try)


def test_waste_is_named_whatever_the_bound():
    verdict = judge(counters(dram=88, sm=20, load_efficiency=12.5, sectors=32, conflicts=31, passes=32))
    said = "; ".join(verdict.evidence)
    assert "global loads use 12 % of the bytes" in said
    assert "global stores touch 32.0 sectors a request" in said
    assert "97% of the passes over shared memory are bank conflicts" in said
    assert sum("coalesce" in t for t in verdict.to_try) == 2 and any("swizzle" in t for t in verdict.to_try)
    clean = judge(counters(dram=88, sm=20, load_efficiency=100, sectors=16, conflicts=1, passes=32))
    assert len(clean.evidence) == 1 and len(clean.to_try) == 1


def test_without_the_busy_shares_there_is_no_guess():
    verdict = judge(counters(waves=0.5, achieved=10))
    assert verdict.bound == "unknown"
    assert "DRAM busy share" in verdict.lacked and "SM busy share" in verdict.lacked
    assert "titan ncu-command" in verdict.to_try[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "is not ncu's output"),
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", "ncu said: ERR_NVGPUCTRPERM - no permission"),
        ("==PROF== Connected to process 1\n", "ncu's messages but no table"),
        (row(*DESCRIBED, "x") + "\n" + row(*[""] * 11, "%"), "has a header and no kernel"),
        (row(*DESCRIBED, "x"), "lacks the row of units"),
        (raw(COPY).split("\n==PROF== Disc")[0][:-30], "is cut off"),
        (raw(COPY).split("\n==PROF== Disc")[0][:-1], "is cut off"),
        (DETAILS[:-60], "is cut off"),
        (DETAILS.replace("Metric Unit", "Einheit"), "lacks the column 'Metric Unit'"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "counters.csv"
    path.write_text(text)
    with pytest.raises(NcuError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_one_line(tmp_path: Path):
    with pytest.raises(NcuError, match="No such file"):
        read(tmp_path / "none.csv")
    (tmp_path / "report.ncu-rep").write_bytes(b"NVR\x00\xff\xfe\x00binary")
    with pytest.raises(NcuError, match="ncu --import"):
        read(tmp_path / "report.ncu-rep")


def app() -> typer.Typer:
    made = typer.Typer()
    ncu_commands.register(made)
    return made


def test_the_command_explains_the_slowest_launch_of_each_kernel(tmp_path: Path):
    path = tmp_path / "counters.csv"
    path.write_text(DETAILS)
    done = CliRunner().invoke(app(), ["ncu", str(path)], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert "matmul: compute-bound" in done.output
    assert "2200.0" in done.output and "1200.0" not in done.output
    assert "not taken: sectors per load, bank conflicts" in done.output


def test_the_command_prints_a_line_that_can_be_pasted():
    done = CliRunner().invoke(
        app(), ["ncu-command", "--kernel", "mat.*", "--count", "1", "--", "python", "-m", "x", "--y"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("ncu --csv --page raw --clock-control none")
    assert done.output.strip().endswith("python -m x --y > counters.csv")
