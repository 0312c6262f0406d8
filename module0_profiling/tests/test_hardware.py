"""Hardware: what the system says is read, and peaks are plausible, cached, and never an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from module0_profiling import commands, hardware, peak_measure
from module0_profiling import device as device_module
from module0_profiling.device import Device, DeviceError, _l3_bytes, describe_machine, detect, parse_cpuinfo
from module0_profiling.hardware import Peaks, best_known_peaks, cache_path, datasheet_peaks, measured_peaks

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16 amx_int8 sse

processor\t: 1
flags\t\t: fpu
"""
GRAVITON = "processor\t: 0\nBogoMIPS\t: 2100\nFeatures\t: fp asimd i8mm bf16 sve\nCPU part\t: 0xd4f\n"
DEVICE = Device("cpu", "Test CPU", units=2, memory_bytes=8 << 30, cache_bytes=1 << 20)
PEAKS = Peaks(30e9, 25e9, {"bfloat16": 2.5e12}, read_method="float32 sum", fingerprint=DEVICE.fingerprint)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def measurements(monkeypatch):
    """Counts measurements; each is 1 GB/s faster than the one before."""
    done: list[Peaks] = []

    def measure(device: Device) -> Peaks:
        done.append(replace(PEAKS, read_bandwidth=PEAKS.read_bandwidth + 1e9 * len(done)))
        return done[-1]

    monkeypatch.setattr(peak_measure, "measure", measure)
    return done


def test_cpuinfo_of_intel_and_arm():
    assert parse_cpuinfo(XEON) == (
        "Intel(R) Xeon(R) Processor (family 6 model 143)",
        ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
    )
    assert parse_cpuinfo(GRAVITON) == ("", ("asimd", "bf16", "i8mm", "sve"))
    assert parse_cpuinfo("") == ("", ())


def test_several_l3_caches_add_up_and_a_shared_one_counts_once(tmp_path):
    for cpu, shared in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        folder = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text("32768K\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    assert _l3_bytes(tmp_path) == 2 * 32 << 20


def test_the_cpu_is_found_without_importing_torch():
    program = (
        "import sys; from module0_profiling.hardware import detect, describe_machine; d = detect('cpu');"
        "describe_machine(); assert 'torch' not in sys.modules; print(d.units, d.memory_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    units, memory = map(int, done.stdout.split())
    assert 1 <= units <= (os.cpu_count() or 1)
    assert memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_machine_is_plain_data():
    assert json.loads(json.dumps(describe_machine()))["cpu"]["kind"] == "cpu"


@pytest.mark.parametrize("kind", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_one_line_with_a_remedy(kind):
    with pytest.raises(DeviceError, match="use ") as refused:
        detect(kind)
    assert "\n" not in str(refused.value)


def test_without_a_gpu_the_default_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(device_module, "_cuda_devices", lambda: ())
    monkeypatch.setattr(device_module, "_mps", lambda: None)
    assert detect().kind == "cpu"
    assert describe_machine()["gpu"] is None


def test_fingerprint_tells_machines_apart():
    others = [replace(DEVICE, name="x"), replace(DEVICE, units=4), replace(DEVICE, memory_bytes=16 << 30)]
    others.append(replace(DEVICE, features=("amx_bf16",)))
    assert len({device.fingerprint for device in [DEVICE, *others]}) == 5


def test_peaks_are_measured_once_and_again_on_refresh(measurements):
    first = measured_peaks(DEVICE)
    assert measured_peaks(DEVICE) == first
    assert len(measurements) == 1
    assert measured_peaks(DEVICE, refresh=True).read_bandwidth == first.read_bandwidth + 1e9
    assert measured_peaks(DEVICE).read_bandwidth == first.read_bandwidth + 1e9
    assert len(measurements) == 2


def test_the_command_prints_rates_ridge_and_a_warning_when_the_machine_was_busy(monkeypatch):
    busy = replace(PEAKS, load=1e6)
    monkeypatch.setattr(peak_measure, "measure", lambda device: busy)
    app = typer.Typer()
    app.command()(commands.peaks)
    shown = CliRunner().invoke(app, ["--device", "cpu"], env={"COLUMNS": "160"}).output
    assert "30 GB/s" in shown and "2.5 TFLOP/s" in shown
    assert "83.3 FLOP/byte" in shown  # 2.5e12 / 30e9
    assert "--refresh" in shown
    failed = CliRunner().invoke(app, ["--device", "tpu"])
    assert failed.exit_code == 2 and "Traceback" not in failed.output


def test_each_machine_has_its_own_peaks(measurements):
    measured_peaks(DEVICE)
    measured_peaks(replace(DEVICE, name="another"))
    assert len(measurements) == 2
    assert len(json.loads(cache_path().read_text())) == 2


def test_a_busy_measurement_is_returned_but_never_lowers_the_cache(monkeypatch):
    quiet = replace(PEAKS, matmul={"bfloat16": 2.5e12})
    busy = replace(
        PEAKS, read_bandwidth=10e9, copy_bandwidth=26e9, matmul={"bfloat16": 1e12, "float32": 1e11}, load=8.0
    )
    runs = iter([quiet, busy])
    monkeypatch.setattr(peak_measure, "measure", lambda device: next(runs))
    measured_peaks(DEVICE)
    assert measured_peaks(DEVICE, refresh=True) == busy
    kept = measured_peaks(DEVICE)
    assert (kept.read_bandwidth, kept.copy_bandwidth) == (30e9, 26e9)
    assert kept.matmul == {"bfloat16": 2.5e12, "float32": 1e11}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"x": 3}', '{"x": {"read_bandwidth": "fast"}}', "\x00"])
def test_a_corrupt_cache_is_measured_again_and_repaired(measurements, text):
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text(text.replace('"x"', json.dumps(DEVICE.fingerprint)))
    measured_peaks(DEVICE)
    assert len(measurements) == 1
    measured_peaks(DEVICE)
    assert len(measurements) == 1


def test_an_unwritable_cache_costs_a_measurement_and_no_error(measurements, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a file where a folder is needed
    assert measured_peaks(DEVICE).read_bandwidth == 30e9
    assert measured_peaks(DEVICE).read_bandwidth == 31e9
    assert len(measurements) == 2


def test_measured_peaks_come_before_the_datasheet(measurements):
    h200 = Device("cuda", "NVIDIA H200", units=132, memory_bytes=141 << 30)
    assert best_known_peaks(h200).source == "datasheet"
    measured_peaks(h200)
    assert best_known_peaks(h200).source == "measured"
    assert best_known_peaks(DEVICE) is None


@pytest.mark.parametrize(
    ("name", "bandwidth", "ridge"),
    [("NVIDIA GeForce RTX 4090", 1008e9, 164), ("a100", 2039e9, 153), ("NVIDIA H200", 4800e9, 206)],
)
def test_datasheets(name, bandwidth, ridge):
    peaks = datasheet_peaks(name)
    assert peaks.read_bandwidth == bandwidth
    assert peaks.roof("bfloat16").ridge == pytest.approx(ridge, abs=1)


@pytest.mark.parametrize("name", ["abacus", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB"])
def test_a_relative_of_a_listed_gpu_does_not_get_its_peaks(name):
    assert datasheet_peaks(name) is None


def test_a_dtype_without_a_rate_is_named():
    with pytest.raises(KeyError, match="float8, only for bfloat16"):
        PEAKS.roof("float8")


def test_buffer_is_larger_than_the_cache_and_smaller_than_the_memory():
    assert peak_measure.buffer_bytes(replace(DEVICE, cache_bytes=32 << 20)) == 512 << 20
    assert peak_measure.buffer_bytes(replace(DEVICE, cache_bytes=256 << 20)) == 1 << 30
    assert peak_measure.buffer_bytes(replace(DEVICE, memory_bytes=1 << 30)) == 256 << 20


def test_the_loops_count_bytes_and_flops_by_a_clock_that_is_known():
    """With a clock that says 1 ms whatever runs, the rates are the sizes times 1000."""
    torch = pytest.importorskip("torch")

    def clock(fn) -> float:
        fn()
        return 1e-3

    buffer = peak_measure._random_buffer(32 << 20, "cpu")
    assert buffer.nbytes == 32 << 20
    assert buffer.isfinite().all() and buffer.view(torch.float32).isfinite().all()
    assert peak_measure.read_bandwidth(buffer, clock, seconds=0)[0] == pytest.approx((32 << 20) * 1e3)
    assert peak_measure.copy_bandwidth(buffer, clock, seconds=0) == pytest.approx((32 << 20) * 1e3)
    assert peak_measure.matmul_rate("float32", "cpu", clock, seconds=0) == pytest.approx(2 * 256**3 * 1e3)
    assert peak_measure.matmul_rate("bool", "cpu", clock, seconds=0) == 0


def test_measuring_this_cpu_gives_rates_of_this_world(monkeypatch):
    torch = pytest.importorskip("torch")
    for name in ("READ_SECONDS", "COPY_SECONDS", "MATMUL_SECONDS"):
        monkeypatch.setattr(peak_measure, name, 0.05)
    monkeypatch.setattr(peak_measure, "buffer_bytes", lambda device: 64 << 20)
    threads = torch.get_num_threads()
    peaks = peak_measure.measure(detect("cpu"))
    assert torch.get_num_threads() == threads
    assert 0.2e9 < peaks.copy_bandwidth <= peaks.read_bandwidth < 3e12
    assert peaks.read_method
    assert set(peaks.matmul) <= set(peak_measure.DTYPES)
    assert all(0.1e9 < rate < 1e15 for rate in peaks.matmul.values())
    assert hardware._plausible(peaks)
