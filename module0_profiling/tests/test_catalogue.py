"""The catalogue of datasheets: rows have sources, agree with the chips' clocks and pins, and are found by name."""

from __future__ import annotations

import itertools

import pytest

from module0_profiling.catalogue import OTHER_VARIANTS, Entry, catalogue, find, match
from module0_profiling.device import DeviceError
from module0_profiling.number_formats import DTYPE_BYTES

ENTRIES = list(catalogue().values())
by_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)


@by_entry
def test_every_row_says_where_its_numbers_are_from_and_all_are_positive(entry: Entry) -> None:
    assert len(entry.source) > 10 and entry.name and entry.kind in ("cuda", "rocm", "mps", "cpu")
    stated = (entry.memory, entry.cache, entry.shared, entry.units, entry.link)
    assert all(number > 0 for number in (entry.bandwidth, *entry.rates.values()))
    assert all(isinstance(number, int) and number > 0 for number in stated if number is not None)
    assert set(entry.rates) <= set(DTYPE_BYTES)
    assert entry.key == entry.key.lower() and " " not in entry.key


@by_entry
def test_units_of_the_file_are_turned_into_bytes_and_seconds(entry: Entry) -> None:
    """Orders of magnitude that no processor of these years leaves: a row in the wrong unit is off by 1000."""
    assert 5e10 < entry.bandwidth < 1e13
    assert all(1e12 < rate < 1e16 for rate in entry.rates.values())
    assert entry.memory is None or 1e10 < entry.memory < 1e12
    assert entry.cache is None or 2**22 < entry.cache < 2**30
    assert entry.shared is None or 2**15 < entry.shared < 2**18
    assert entry.link is None or 1e10 < entry.link < 1e12
    assert entry.units is None or 4 <= entry.units < 1000


@by_entry
def test_narrower_numbers_are_never_multiplied_more_slowly(entry: Entry) -> None:
    order = [entry.rates[dtype] for dtype in ("float32", "float16", "fp8") if dtype in entry.rates]
    assert order == sorted(order)
    assert entry.rates.get("float16") == entry.rates.get("bfloat16")
    if "int8" in entry.rates:
        assert entry.rates["int8"] >= entry.rates.get("fp8", entry.rates["float16"])


@by_entry
def test_fast_memory_of_a_gpu_is_faster_than_its_link(entry: Entry) -> None:
    assert entry.link is None or 5 * entry.link < entry.bandwidth


def test_a_row_as_the_rest_of_the_program_reads_it() -> None:
    entry = find("a100-40gb")
    assert (entry.name, entry.kind, entry.bandwidth, entry.memory) == ("A100 SXM 40GB", "cuda", 1555e9, 40 * 10**9)
    assert (entry.rates["bfloat16"], entry.cache, entry.shared) == (312e12, 40 * 2**20, 164 * 2**10)
    assert (entry.units, entry.link) == (108, 300e9)
    assert find("m4").rates == {} and find("xeon-8480").memory is None  # not stated, so not there


# Against what the chips are built of: units x clock x FLOPs of a unit and clock; pins x transfers/s.

FLOPS_A_CLOCK = {
    # key: units, boost clock in GHz, dtype -> FLOPs of one unit in one clock, a multiply-add being two
    "3090": (82, 1.695, {"float32": 256, "float16": 512, "int8": 2048}),
    "4090": (128, 2.52, {"float32": 256, "float16": 512, "fp8": 1024, "int8": 2048}),
    "5090": (170, 2.407, {"float32": 256, "float16": 512, "fp8": 1024, "int8": 2048}),
    "a100": (108, 1.41, {"float32": 128, "float16": 2048, "int8": 4096}),
    "a100-40gb": (108, 1.41, {"float32": 128, "float16": 2048, "int8": 4096}),
    "l4": (58, 2.04, {"float32": 256, "float16": 1024, "fp8": 2048, "int8": 2048}),
    "l40s": (142, 2.52, {"float32": 256, "float16": 1024, "fp8": 2048, "int8": 2048}),
    "h100": (132, 1.83, {"float16": 4096, "fp8": 8192, "int8": 8192}),  # tensor cores; float32 runs at 1.98
    "h200": (132, 1.83, {"float16": 4096, "fp8": 8192, "int8": 8192}),
    "mi300x": (304, 2.1, {"float32": 256, "float16": 2048, "fp8": 4096, "int8": 4096}),
}


@pytest.mark.parametrize("key", FLOPS_A_CLOCK)
def test_rates_are_units_times_clock_times_what_a_unit_does(key: str) -> None:
    units, clock, each = FLOPS_A_CLOCK[key]
    entry = find(key)
    assert entry.units == units
    assert set(entry.rates) - set(each) <= {"bfloat16", "float32"}
    for dtype, flops in each.items():
        assert entry.rates[dtype] == pytest.approx(units * clock * 1e9 * flops, rel=0.03), dtype


PINS = {
    # key: bits of the memory's bus, 10^9 transfers/s of each
    "3090": (384, 19.5),
    "4090": (384, 21),
    "5090": (512, 28),
    "a100-40gb": (5120, 2.43),
    "a100": (5120, 3.186),
    "l4": (192, 12.5),
    "l40s": (384, 18),
    "mi300x": (8192, 5.2),
    "m1": (128, 4.266),
    "m1-max": (512, 6.4),
    "m1-ultra": (1024, 6.4),
    "m2": (128, 6.4),
    "m3-max": (512, 6.4),
    "m4": (128, 7.5),
    "m4-max": (512, 8.533),
    "xeon-8480": (8 * 64, 4.8),
    "epyc-9654": (12 * 64, 4.8),
    "epyc-7763": (8 * 64, 3.2),
    "i9-13900k": (2 * 64, 5.6),
    "graviton3": (8 * 64, 4.8),
}


@pytest.mark.parametrize("key", PINS)
def test_bandwidth_is_that_of_the_pins(key: str) -> None:
    bits, transfers = PINS[key]
    assert find(key).bandwidth == pytest.approx(bits / 8 * transfers * 1e9, rel=0.03)


@pytest.mark.parametrize(
    ("key", "links", "each_way"),
    [("3090", 4, 14.0625), ("a100", 12, 25), ("h100", 18, 25), ("h200", 18, 25), ("b200", 18, 50), ("mi300x", 7, 64)],
)
def test_links_are_counted_one_way(key: str, links: int, each_way: float) -> None:
    assert find(key).link == links * each_way * 1e9


# Finding a row.


@pytest.mark.parametrize(
    ("reported", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-40GB", "a100-40gb"),  # drivers before 2021
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 5090", "5090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Apple M1 GPU", "m1"),
        ("Apple M1 Max GPU", "m1-max"),
        ("Apple M1 Ultra GPU", "m1-ultra"),
        ("Apple M4 Max GPU", "m4-max"),
        ("Intel(R) Xeon(R) Platinum 8480+", "xeon-8480"),
        ("AMD EPYC 9654 96-Core Processor", "epyc-9654"),
        ("AMD EPYC 7763 64-Core Processor", "epyc-7763"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", "i9-13900k"),
    ],
)
def test_a_device_is_found_by_the_name_that_its_driver_reports(reported: str, key: str) -> None:
    found = match(reported)
    assert found is not None and found.key == key
    assert [e.key for e in ENTRIES if e.words <= words(reported) and not e.without & words(reported)] == [key]


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA GB200",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM-64GB",  # Leonardo's, of its own bandwidth
        "NVIDIA A10",
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "AMD Instinct MI300A",
        "AMD Instinct MI325X",
        "Apple M1 Pro GPU",
        "Apple M2 Max GPU",
        "Apple M4 Pro GPU",
        "Apple M1",  # the CPU
        "Intel(R) Xeon(R) Platinum 8480C",
        "Intel(R) Xeon(R) Platinum 8480CL",
        "AMD EPYC 9654P 96-Core Processor",
        "13th Gen Intel(R) Core(TM) i9-13900KF",
        "",
    ],
)
def test_a_relative_matches_nothing_rather_than_a_wrong_row(reported: str) -> None:
    assert match(reported) is None


def words(name: str) -> set[str]:
    return set(name.lower().replace("-", " ").split())


def test_no_two_rows_match_the_same_names() -> None:
    """Where the words of one row are among those of another, the first one says that it does not mean the second."""
    for a, b in itertools.permutations(ENTRIES, 2):
        assert not a.words <= b.words or a.without & b.words, (a.key, b.key)


@by_entry
def test_every_row_can_match(entry: Entry) -> None:
    assert entry.words and not entry.words & (OTHER_VARIANTS | entry.without)
    assert match(" ".join(entry.words)) == entry
    assert all(word == word.lower() and "-" not in word for word in entry.words | entry.without)


@by_entry
def test_every_row_is_found_by_its_key(entry: Entry) -> None:
    assert find(entry.key) == find(f" {entry.key.upper().replace('-', ' ')} ") == entry


@pytest.mark.parametrize("name", ["h9000", "", "NVIDIA H200"])
def test_an_unknown_name_is_one_line_that_lists_what_exists(name: str) -> None:
    with pytest.raises(DeviceError) as refused:
        find(name)
    line = str(refused.value)
    assert line.startswith(f"device {name!r} is unknown: use here, cpu, cuda, mps, or one of ") and "\n" not in line
    assert line.split("one of ")[1].split(", ") == [entry.key for entry in ENTRIES]


def test_nobody_can_change_the_catalogue() -> None:
    with pytest.raises(TypeError):
        catalogue()["x"] = find("h200")  # type: ignore[index]
    with pytest.raises(TypeError):
        find("h200").rates["bfloat16"] = 1.0  # type: ignore[index]
